"""How far another draw of test images could move a figure: 95 % intervals, and whether two figures differ by more.

A share of images (top-1, recall at k) has Wilson's score interval (Wilson, 1927): it has a width where all images are
right, or none, and the bootstrap has none there. Other figures have the bootstrap's by the percentile method, from a
fixed seed; where all resamples agree, Wilson's of the same figure replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

METHOD = "Wilson's for a share of images, else the bootstrap's"
"""What reports and pages say of their intervals."""
WITHIN = "difference within the interval"
QUANTILE = 1.959963984540054  # of the normal distribution at 97.5 %
RESAMPLES = 1000
RESAMPLED_VALUES = 2**22  # that are held at once

Interval = tuple[float, float]

# Axes: N images, X resamples.


def share_interval(percent: float, num_images: float) -> Interval:
    """Wilson's score interval of a share of `num_images` images, in percent. With n images, share p and z = 1.96:

    (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    share, spread = min(max(percent / 100.0, 0.0), 1.0), QUANTILE**2 / num_images
    centre = share + spread / 2
    reach = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    low, high = ((centre + sign * reach) / (1 + spread) for sign in (-1, 1))
    return 100.0 * min(max(low, 0.0), share), 100.0 * max(min(high, 1.0), share)


def mean_interval(values_N: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """That of the mean of one percentage per image (N,): Wilson's if each image is right or wrong (100 or 0)."""
    values_N = values_N.cpu().double()
    mean = values_N.mean().item()
    if ((values_N == 0) | (values_N == 100)).all():
        return share_interval(mean, len(values_N))
    return or_of_a_share(bootstrap_interval(values_N, resamples=resamples, seed=seed), mean, len(values_N))


def bootstrap_interval(values_N: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """That of the mean of one value per image (N,), of any unit, from resamples; none where all values are the same."""
    generator = torch.Generator().manual_seed(seed)
    values_N, count = values_N.cpu().double(), len(values_N)
    at_once = max(1, RESAMPLED_VALUES // count)
    means = [
        values_N[torch.randint(count, (min(at_once, resamples - first), count), generator=generator)].mean(dim=1)
        for first in range(0, resamples, at_once)
    ]
    return percentiles(torch.cat(means))


def resampled_interval(
    measure: Callable[[Tensor], float],
    num_images: int,
    *,
    counted_as: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """That of a measure, in percent, of the images with these numbers (N,), drawn with replacement.

    counted_as: how many images the figure is worth as a share, where it weighs some more than others.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [measure(torch.randint(num_images, (num_images,), generator=generator)) for _ in range(resamples)]
    of_all = measure(torch.arange(num_images))
    return or_of_a_share(percentiles(torch.tensor(found, dtype=torch.float64)), of_all, counted_as or num_images)


def percentiles(resampled_X: Tensor) -> Interval:
    low, high = resampled_X.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def or_of_a_share(interval: Interval, percent: float, num_images: float) -> Interval:
    """The interval, or Wilson's of the same figure where the resamples did not differ."""
    return interval if interval[0] < interval[1] else share_interval(percent, num_images)


def intervals_overlap(one: Interval | None, other: Interval | None) -> bool:
    """Whether two figures may differ by chance; not where one has no interval."""
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]

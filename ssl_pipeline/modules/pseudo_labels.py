"""What weak views are trusted with: the classes they guess, and what each guess weighs. One weighting per paper.

All weightings are called alike and can take each other's place. `forward` counts the present batch in where the paper
does, and changes nothing; `after_step` stores it. Statistics are over the rows of all processes, each of which brings
the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssl_pipeline.distributed import gather, mean_over_ranks
from ssl_pipeline.losses import align_distribution, relative_threshold
from ssl_pipeline.losses.precision import sum_dtype
from ssl_pipeline.modules.image_memory import ScoreBoard
from ssl_pipeline.modules.memory import MovingDistribution, RecentDistribution

# Axes: U unlabelled images, B labelled ones, C classes.
Carries = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class PseudoLabels:
    """What a weighting makes of U images; nothing of it carries a gradient.

    targets: (U,) classes. weights: (U,), bool where a guess is kept or not.
    metrics: `kept`, the mean weight, and the weighting's own. carry: what `after_step` wants to have, of this batch.
    """

    targets: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]
    carry: dict[str, Tensor] = field(default_factory=dict)


class FixedThreshold(nn.Module):
    """FixMatch's: a guess counts if its probability reaches `threshold`."""

    def __init__(self, *, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, weak_UC: Tensor, labelled_BC: Tensor, sample_ids_U: Tensor) -> PseudoLabels:
        """From the logits of the weak views; those of the labelled images and the images' numbers are not used."""
        confidence_U, guesses_U = _probabilities(weak_UC).max(dim=1)
        return _kept(guesses_U, confidence_U >= self.threshold)

    def after_step(self, carries: Carries) -> None:
        """Nothing to store."""


class CurriculumThresholds(nn.Module):
    """FlexMatch's: each class has its threshold, lower the fewer images were learnt to be of it (`ScoreBoard`).

    The thresholds of a step are those of the steps before it.
    """

    def __init__(self, num_images: int, num_classes: int, *, threshold: float, warmup: bool = True) -> None:
        super().__init__()
        self.board = ScoreBoard(num_images, num_classes, threshold=threshold, warmup=warmup)

    def forward(self, weak_UC: Tensor, labelled_BC: Tensor, sample_ids_U: Tensor) -> PseudoLabels:
        """From the logits of the weak views and the images' numbers; the labelled images' logits are not used."""
        confidence_U, guesses_U = _probabilities(weak_UC).max(dim=1)
        thresholds_C = self.board.thresholds()
        carry = {"sample_ids": sample_ids_U, "confidence": confidence_U, "guesses": guesses_U}
        return _kept(guesses_U, confidence_U >= thresholds_C[guesses_U], carry, threshold=thresholds_C.mean())

    def after_step(self, carries: Carries) -> None:
        for carry in carries:
            self.board.record(*(gather(carry[name]) for name in ("sample_ids", "confidence", "guesses")))


class RelativeThreshold(nn.Module):
    """AdaMatch's: a share of the mean confidence on the labelled images, after the distributions were aligned.

    window: batches that the model's distribution is taken over; None: a moving mean like the labelled one, as in USB.
    """

    def __init__(self, num_classes: int, *, share: float, momentum: float = 0.999, window: int | None = 128) -> None:
        super().__init__()
        self.share = share
        self.labelled = MovingDistribution(num_classes, momentum=momentum)
        self.unlabelled: MovingDistribution | RecentDistribution
        if window is None:
            self.unlabelled = MovingDistribution(num_classes, momentum=momentum, start="batch")
        else:
            self.unlabelled = RecentDistribution(num_classes, window=window)

    def forward(self, weak_UC: Tensor, labelled_BC: Tensor, sample_ids_U: Tensor) -> PseudoLabels:
        """From the logits of the weak views of both; the images' numbers are not used."""
        labelled_BC, probabilities_UC = _probabilities(labelled_BC), _probabilities(weak_UC)
        labelled_C, unlabelled_C = _global_mean(labelled_BC), _global_mean(probabilities_UC)
        aligned_UC = align_distribution(
            probabilities_UC, self.labelled.after(labelled_C), self.unlabelled.after(unlabelled_C)
        )
        threshold = relative_threshold(labelled_BC, share=self.share)
        confidence_U, guesses_U = aligned_UC.max(dim=1)
        carry = {"labelled": labelled_C, "unlabelled": unlabelled_C}
        return _kept(guesses_U, confidence_U >= threshold, carry, threshold=threshold)

    def after_step(self, carries: Carries) -> None:
        self.labelled.update(_mean_of(carries, "labelled"))
        self.unlabelled.update(_mean_of(carries, "unlabelled"))


class SelfAdaptiveThresholds(nn.Module):
    """FreeMatch's: the moving mean of the confidence, times what each class is predicted relative to the most frequent
    one.

    confidence: (), from 1 / C. predictions, guesses: moving means of the probabilities and of the guessed classes.
    limits: what the thresholds are clamped to, (0.9, 0.95) for SVHN.
    """

    confidence: Tensor

    def __init__(self, num_classes: int, *, momentum: float = 0.999, limits: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.momentum, self.limits = momentum, limits
        self.register_buffer("confidence", torch.full((), 1 / num_classes))
        self.predictions = MovingDistribution(num_classes, momentum=momentum)
        self.guesses = MovingDistribution(num_classes, momentum=momentum)

    def forward(self, weak_UC: Tensor, labelled_BC: Tensor, sample_ids_U: Tensor) -> PseudoLabels:
        """From the logits of the weak views; those of the labelled images and the images' numbers are not used."""
        probabilities_UC = _probabilities(weak_UC)
        confidence_U, guesses_U = probabilities_UC.max(dim=1)
        guessed_UC = torch.zeros_like(probabilities_UC).scatter_(1, guesses_U[:, None], 1)
        carry = {
            "confidence": _global_mean(confidence_U),
            "predictions": _global_mean(probabilities_UC),
            "guesses": _global_mean(guessed_UC),
        }
        predictions_C = self.predictions.after(carry["predictions"])
        thresholds_C = self._confidence_after(carry["confidence"]) * predictions_C / predictions_C.max()
        if self.limits is not None:
            thresholds_C = thresholds_C.clamp(*self.limits)
        return _kept(guesses_U, confidence_U >= thresholds_C[guesses_U], carry, threshold=thresholds_C.mean())

    def after_step(self, carries: Carries) -> None:
        self.confidence.copy_(self._confidence_after(_mean_of(carries, "confidence")))
        self.predictions.update(_mean_of(carries, "predictions"))
        self.guesses.update(_mean_of(carries, "guesses"))

    def _confidence_after(self, mean: Tensor) -> Tensor:
        return torch.lerp(mean.to(self.confidence.dtype), self.confidence, self.momentum)


class GaussianWeights(nn.Module):
    """SoftMatch's: every guess counts, the less the further its confidence lies below the mean.

    With mu and var the moving mean and variance of the confidence (from 1 / C and 1), and the confidence that of the
    probabilities aligned to uniform:

        weight = exp(-min(confidence - mu, 0)^2 / (2 var / num_sigmas^2))

    The guesses are those of the probabilities as they are.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, num_classes: int, *, momentum: float = 0.999, num_sigmas: float = 2.0) -> None:
        super().__init__()
        self.momentum, self.num_sigmas = momentum, num_sigmas
        self.register_buffer("mean", torch.full((), 1 / num_classes))
        self.register_buffer("variance", torch.ones(()))
        self.predictions = MovingDistribution(num_classes, momentum=momentum, start="batch")

    def forward(self, weak_UC: Tensor, labelled_BC: Tensor, sample_ids_U: Tensor) -> PseudoLabels:
        """From the logits of the weak views; those of the labelled images and the images' numbers are not used."""
        probabilities_UC = _probabilities(weak_UC)
        confidence_U, guesses_U = probabilities_UC.max(dim=1)
        carry = {"predictions": _global_mean(probabilities_UC), "confidence": gather(confidence_U)}
        mean, variance = self._after(carry["confidence"])
        predictions_C = self.predictions.after(carry["predictions"])
        uniform_C = torch.full_like(predictions_C, 1 / len(predictions_C))
        aligned_U = align_distribution(probabilities_UC, uniform_C, predictions_C).amax(dim=1)
        below_U = (aligned_U - mean).clamp(max=0)
        weights_U = (-below_U.square() / (2 * variance / self.num_sigmas**2)).exp()
        return _kept(guesses_U, weights_U, carry, confidence_mean=mean, confidence_std=variance.sqrt())

    def after_step(self, carries: Carries) -> None:
        mean, variance = self._after(torch.cat([carry["confidence"] for carry in carries]))
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.predictions.update(_mean_of(carries, "predictions"))

    def _after(self, confidence_U: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance with these rows, of all processes, counted in."""
        if len(confidence_U) < 2:
            raise ValueError("GaussianWeights needs at least 2 unlabelled images, over all processes. Got 1.")
        new = confidence_U.to(self.mean.dtype)
        mean = torch.lerp(new.mean(), self.mean, self.momentum)
        return mean, torch.lerp(new.var(), self.variance, self.momentum)


Weighting = FixedThreshold | CurriculumThresholds | RelativeThreshold | SelfAdaptiveThresholds | GaussianWeights


def _probabilities(logits: Tensor) -> Tensor:
    return logits.detach().softmax(dim=1, dtype=sum_dtype(logits))


def _global_mean(rows: Tensor) -> Tensor:
    """The mean over the rows of all processes."""
    return mean_over_ranks(rows.mean(dim=0))


def _mean_of(carries: Carries, name: str) -> Tensor:
    """The mean over micro-batches."""
    return torch.stack([carry[name] for carry in carries]).mean(dim=0)


def _kept(
    guesses_U: Tensor, weights_U: Tensor, carry: dict[str, Tensor] | None = None, **metrics: Tensor
) -> PseudoLabels:
    return PseudoLabels(guesses_U, weights_U, {"kept": weights_U.float().mean(), **metrics}, carry or {})

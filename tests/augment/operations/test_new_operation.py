"""A further operation is its own file and a word in the list: here `Invert`, in this file."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.augment.draw import ViewSampler, num_draws, num_uniforms
from ssl_pipeline.augment.on_accelerator import augment_on_accelerator
from ssl_pipeline.augment.operations import OPERATIONS, ViewSettings
from ssl_pipeline.augment.operations.base import ByChance, Probability, change_due, per_sample
from ssl_pipeline.augment.photometric import apply_photometric, stages_per_view
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import Config, ConfigError, validate


class InvertSettings(ViewSettings):
    """When a view is inverted."""

    invert_prob: Probability = 0.0
    """Probability of inversion."""


class Invert(ByChance[InvertSettings, bool]):
    """1 - image."""

    settings = InvertSettings
    probability = "invert_prob"

    def setting(self, group, view, *, size):
        return self.probabilities(group)[view] > 0 or None

    def on_cpu(self, image_NCHW, draws_NP, setting):
        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, lambda part_NCHW, _: 1 - part_NCHW)

    def on_accelerator(self, image_NCHW, draws_NP, setting):
        return torch.where(per_sample(draws_NP[:, 0]) > 0, 1 - image_NCHW, image_NCHW)


class Group(InvertSettings, ViewGroup):
    """What ViewGroup becomes by one more word in OPERATIONS."""

    operations = (*OPERATIONS[:2], Invert(), *OPERATIONS[2:])


def drawn(group, num_images=40):
    numbers = np.arange(num_images)
    sampler = ViewSampler({"view": group}, {}, seed=0, global_batch=num_images)
    sizes = {"heights_B": 20 + numbers, "widths_B": 60 - numbers}
    return sampler.draw(range(num_images), epochs_B=0 * numbers, samples_B=numbers, **sizes)["view"]


def test_its_keys_and_their_mistakes_are_those_of_the_group():
    class Recipe(Config):
        """A recipe."""

        augment: dict[str, Group]
        """Views."""

    recipe = validate(Recipe, {"augment": {"view": {"size": 8, "invert_prob": [0.5, 1.0], "count": 2}}})
    assert recipe.augment["view"].invert_prob == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"^augment\.view\.invert_prob must be between 0 and 1\. Got 2\.$"):
        validate(Recipe, {"augment": {"view": {"size": 8, "invert_prob": 2.0}}})


def test_where_it_is_off_nothing_else_changes():
    off, plain = Group(size=8), ViewGroup(size=8)
    assert (num_uniforms(off), num_draws(off)) == (num_uniforms(plain), num_draws(plain))
    assert np.array_equal(drawn(off).draws, drawn(plain).draws)
    assert np.array_equal(drawn(off).boxes, drawn(plain).boxes)


def test_both_drivers_apply_it_in_its_place():
    group = Group(size=8, invert_prob=0.5, blur_prob=1.0, solarize_prob=0.5, rand_augment=1, cutout=(0.2, 0.4))
    draws = torch.from_numpy(drawn(group).draws)
    column = 10  # after jitter and grayscale
    assert 10 < draws[0, :, column].sum() < 30
    crops = torch.randint(0, 256, (1, 40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    normalised = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    views = apply_photometric(crops, draws, group, **normalised)
    (stages,) = stages_per_view(group, size=8, **normalised)
    off = (augment_on_accelerator(crops[0], draws[0], stages) - views[0]).abs().flatten(1).amax(dim=1)
    assert (off < 1e-4).float().mean() > 0.8  # elsewhere 8 bits decide by rounding
    alone = Group(size=8, invert_prob=1.0, jitter_prob=0.0, gray_prob=0.0)
    inverted = apply_photometric(crops, torch.from_numpy(drawn(alone).draws), alone, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert_close(inverted, 1 - crops / 255)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: type(operation).__name__)
def test_an_operation_keeps_its_word_about_its_numbers(operation):
    for group in (ViewGroup(count=2, size=16), ViewGroup(count=2, size=16, rand_augment=3, cutout=(0.1, 0.5))):
        num_uniforms = operation.num_uniforms(group)
        if num_uniforms:
            draws = operation.draw(np.random.default_rng(0).random((2, 5, num_uniforms)), group, size=16)
            assert draws.shape == (2, 5, operation.num_draws(group))
            assert draws.dtype == np.float32
        else:
            assert operation.num_draws(group) == 0
    assert issubclass(ViewGroup, operation.settings)

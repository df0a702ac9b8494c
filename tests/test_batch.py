"""What a method may ask for: mistakes in a mask's rule are told where the rule is made."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.batch import Batch, MaskRule, RunFacts
from ssl_pipeline.config import ConfigError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "squares"}, "kind of a mask must be one of random, blocks, units. Got squares."),
        ({"ratio": 1.5}, "ratio of a mask must be between 0 and 1, a pair increasing. Got 1.5."),
        ({"ratio": -0.2}, "ratio of a mask must be between 0 and 1"),
        ({"ratio": (0.5, 0.1)}, r"ratio of a mask must be between 0 and 1, a pair increasing. Got \(0.5, 0.1\)."),
        ({"probability": 2.0}, "probability of a mask must be between 0 and 1. Got 2.0."),
        ({"num_masked": 3}, "num_masked of a mask must be left out unless kind is blocks. Got 3."),
        (
            {"kind": "blocks", "num_masked": 3, "stratified": True},
            "num_masked of a mask must be left out of stratified",
        ),
        ({"kind": "blocks", "min_block": 9, "max_block": 4}, "min_block of a mask must be from 1 to max_block. Got 9."),
        ({"patch_size": 0}, "patch_size of a mask must be at least 1. Got 0."),
    ],
)
def test_a_rule_that_makes_no_mask_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MaskRule(**({"kind": "random", "patch_size": 16} | settings))


def test_views_are_unpacked_by_name():
    views = torch.arange(4.0).view(2, 1, 1, 1, 2)
    batch = Batch({"view": views, "weak": views[:1]}, torch.zeros(1), torch.zeros(1))
    first, second = batch.two("view")
    assert first.tolist() == [[[[0, 1]]]]
    assert second.tolist() == [[[[2, 3]]]]
    assert batch.one("weak").tolist() == [[[[0, 1]]]]
    with pytest.raises(ValueError, match="unpack"):
        batch.one("view")


def test_a_group_has_its_own_normalisation_or_that_of_the_data():
    facts = RunFacts(100, None, 8, {}, (0.5,) * 3, (0.2,) * 3, group_mean={"tokens": (0.1,) * 3})
    assert facts.normalisation("image") == ((0.5,) * 3, (0.2,) * 3)
    assert facts.normalisation("tokens") == ((0.1,) * 3, (0.2,) * 3)
    facts.require_normalisation("tokens", (0.1,) * 3, (0.2,) * 3, why="It needs")
    with pytest.raises(
        ConfigError, match=r"^It needs images with mean \[0\.5, .* set augment\.tokens\.mean and \.std\.$"
    ):
        facts.require_normalisation("tokens", (0.5,) * 3, (0.2,) * 3, why="It needs")

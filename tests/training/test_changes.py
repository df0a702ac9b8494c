"""What a run may change when it goes on is said where each setting is declared; all else may not change."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ChangeMark, Config, MayChange, load, recipe_files
from ssl_pipeline.config.schema import walk
from ssl_pipeline.schedule import Duration
from ssl_pipeline.training.changes import changes


class Inner(Config):
    """A section."""

    kept: int = 1
    free: MayChange[int | None] = 2


class First(Config):
    """One member of a union."""

    name: Literal["first"] = "first"
    width: int = 3


class Second(Config):
    """The other one."""

    name: Literal["second"] = "second"
    height: int = 3


class Outer(Config):
    """A command's settings."""

    inner: Inner = Inner()
    anyway: MayChange[Inner | None] = None
    groups: dict[str, Inner] = Field(default_factory=dict)
    either: First | Second = First()
    listed: tuple[int, ...] = (1, 2)
    every: Duration = Duration("5%")


def told(before: Outer, now: Outer) -> list[tuple[str, bool]]:
    return [(str(change), change.allowed) for change in changes(before, now)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"inner": Inner(kept=4, free=None)}, [("inner.kept: 1 -> 4", False), ("inner.free: 2 -> null", True)]),
        ({"groups": {"a": Inner(free=3)}}, [('groups.a: null -> {"kept": 1, "free": 3}', False)]),
        ({"either": Second(height=9)}, [("either.name: first -> second", False)]),
        ({"every": Duration("20%")}, [("every: 5% -> 20%", False)]),
        ({"listed": (2, 1)}, [("listed: [1, 2] -> [2, 1]", False)]),
        ({"anyway": Inner()}, [('anyway: null -> {"kept": 1, "free": 2}', True)]),
    ],
)
def test_each_difference_is_found_with_its_mark(settings, expected):
    assert told(Outer(), Outer(**settings)) == expected


def test_a_mark_on_a_section_holds_for_all_of_it():
    assert told(Outer(anyway=Inner()), Outer(anyway=Inner(kept=2))) == [("anyway.kept: 1 -> 2", True)]
    groups = ({"a": Inner(kept=kept)} for kept in (1, 5))
    assert told(*(Outer(groups=group) for group in groups)) == [("groups.a.kept: 1 -> 5", False)]


SAMPLING = {"data.max_pixels", "data.block_shards", "data.image_key", "data.mean", "data.std"}
FREE = {
    "data.workers",
    "data.batch_size",
    "data.shards",
    "data.labelled.batch_size",
    "optim.lr",
    "optim.weight_decay",
    "train.epochs",
    "train.steps",
    "train.accumulate",
    "train.precision",
    "train.save_every",
    "train.log_every",
    "train.keep_checkpoints",
    "backbone.checkpoint_activations",
}


def marks(config: Config, prefix: str = "") -> dict[str, bool]:
    """Whether each key that the schema has may change, by the marks alone."""
    found = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        marked = any(isinstance(mark, ChangeMark) for mark in field.metadata)
        if isinstance(value, Config) and not marked:
            found |= marks(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = marked
    return found


def test_of_a_real_recipe_what_shapes_tensors_or_draws_samples_is_kept():
    config = load(PretrainConfig, ["recipe=cifar10_fixmatch_wrn28_2", "data.labelled.shards=x"], recipes=RECIPES)
    found = marks(config)
    kept = {key for key, free in found.items() if not free}
    assert found.keys() - kept >= FREE
    assert kept >= SAMPLING | {"seed", "augment", "backbone.name", "backbone.arguments", "optim.name", "optim.betas"}
    assert {key for key in found if key.startswith("method.")} <= kept
    assert {key for key in found if key.startswith("train.")} & kept == set(), "decide, and mark it or list it here"


def test_marks_stand_around_whole_types():
    """Inside of a union pydantic would not tell of it, and the field would silently be one that is kept."""
    for recipe in recipe_files(RECIPES):
        argv = [f"recipe={recipe}", "data.labelled.shards=x"] if "fixmatch" in recipe else [f"recipe={recipe}"]
        config = load(PretrainConfig, argv, recipes=RECIPES)
        for key, field in walk(PretrainConfig, config.model_dump()):
            assert "ChangeMark" not in str(field.annotation), key

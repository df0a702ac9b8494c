"""What a declared range means: for a number, for several, for a schedule at any time."""

import json
import math
import random
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from ssl_pipeline.config import Config, ConfigError, InRange, load, validate
from ssl_pipeline.config.ranges import LARGEST_WHOLE, ranges_of
from ssl_pipeline.schedule import Progress, Schedule


class Section(Config):
    """Every kind of field that holds numbers."""

    whole: int = 1
    share: float = Field(0.5, ge=0, lt=1)
    pair: Annotated[tuple[float, float], InRange(gt=0, le=1, increasing=True)] = (0.1, 1.0)
    one_or_many: Annotated[float | tuple[float, ...], InRange(ge=0, le=1)] = 0.0
    items: tuple[Annotated[int, Field(gt=0)], ...] = ()
    by_name: dict[str, bool | int | float | str] = Field(default_factory=dict)
    momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.9)
    temperature: Annotated[Schedule, InRange(gt=0)] = Schedule(value=0.1)


class Root(Config):
    """A section of it."""

    a: Section = Section()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("whole=10000000000000000000", f"whole must be at most {LARGEST_WHOLE}. Got 10000000000000000000."),
        ("whole=-10000000000000000000", f"whole must be at least -{LARGEST_WHOLE}. Got -10000000000000000000."),
        ("share=1", "share must be below 1. Got 1."),
        ("pair=0.5,0.1", "pair must be an increasing pair, each above 0 and at most 1. Got [0.5, 0.1]."),
        ("pair=0,1", "pair must be an increasing pair, each above 0 and at most 1. Got [0, 1]."),
        ("pair=0.1,.nan", "pair[1] must be a finite number. Got nan."),
        ("one_or_many=1.5", "one_or_many must be between 0 and 1. Got 1.5."),
        ("one_or_many=[0.5, -1]", "one_or_many must be between 0 and 1. Got -1."),
        ("items=3,0", "items[1] must be above 0. Got 0."),
        ("by_name.size=1e300", "by_name must be at most 1000000000000. Got 1e+300."),
        ("momentum=1.5", "momentum.value must be between 0 and 1. Got 1.5."),
        ("momentum=1e13", "momentum.value must be between 0 and 1. Got 10000000000000."),
        ("temperature=1e13", "temperature.value must be above 0 and at most 1000000000000. Got 10000000000000."),
        ("temperature.start=1e13", "temperature.start must be at most 1000000000000. Got 10000000000000."),
        ("momentum.final=-1", "momentum.final must be between 0 and 1. Got -1."),
        ("momentum={value: 0.9, warmup: 1ep, start: 2}", "momentum.start must be between 0 and 1. Got 2."),
        ("momentum={value: 0.9, delay: 3, start: 2}", "momentum.start must be between 0 and 1. Got 2."),
        ("temperature=0", "temperature.value must be above 0. Got 0."),
        ("temperature.warmup=1ep", "temperature.start must be above 0. Got 0."),
        ("temperature.warmup=1000000000000", "temperature.warmup: a duration is at most 1000000000"),
        ("temperature={value: 1, decay: steps, milestones: [3], factor: 2}", "temperature.factor must be at most 1."),
    ],
)
def test_a_number_outside_its_range_is_told_with_its_key(argument, sentence):
    with pytest.raises(ConfigError) as caught:
        load(Root, [f"a.{argument}"])
    assert str(caught.value).startswith(f"a.{sentence}")
    assert "\n" not in str(caught.value)


def test_what_a_schedule_does_not_use_may_be_anything():
    assert load(Root, ["a.temperature.start=0"]).a.temperature.start == 0  # no warm-up begins there
    assert load(Root, ["a.momentum={value: 1, decay: cosine_7_16, final: 7}"]).a.momentum.final == 7


def test_truth_values_are_no_numbers_and_null_has_no_range():
    class Optional(Config):
        limit: Annotated[int | None, InRange(ge=1)] = None

    assert validate(Optional, {"limit": None}).limit is None
    assert load(Root, ["a.by_name.pretrained=true"]).a.by_name == {"pretrained": True}


def test_ranges_are_found_wherever_they_are_declared():
    found = {name: [str(found) for found in ranges_of(field)] for name, field in Section.model_fields.items()}
    assert found == {
        "whole": [],
        "share": ["at least 0 and below 1"],
        "pair": ["an increasing pair, each above 0 and at most 1"],
        "one_or_many": ["between 0 and 1"],
        "items": ["above 0"],
        "by_name": [],
        "momentum": ["between 0 and 1"],
        "temperature": ["above 0"],
    }


def random_schedule(numbers: random.Random) -> dict[str, object]:
    """Keys of a schedule, most of which fit together."""
    some = [-0.5, 0.0, 0.04, 0.3, 0.9, 1.0, 1.2]
    decay = numbers.choice(["cosine", "linear", "cosine_arc", "cosine_7_16", "steps"])
    keys = {
        "value": numbers.choice(some),
        "decay": decay,
        "every": numbers.choice(["step", "epoch"]),
        "warmup": numbers.choice([0, 3, "40%", "100%"]),
        "start": numbers.choice(some),
        "rise": numbers.choice(["linear", "cosine", "exponential"]),
        "delay": numbers.choice([0, 0, 2]),
    }
    if decay == "steps":
        return keys | {"milestones": [2, "50%"], "factor": numbers.choice([0.1, 1.0])}
    ends = {"decay_for": numbers.choice([None, 5]), "reach_final": numbers.choice([True, False])}
    return keys | numbers.choice([{}, {"final": numbers.choice(some)} | ends])


@pytest.mark.parametrize("allowed", [InRange(ge=0, le=1), InRange(gt=0), InRange(ge=0.04, le=0.9)], ids=str)
def test_a_schedule_that_passes_stays_in_its_range_at_every_step(allowed):
    numbers, passed = random.Random(0), 0
    for _ in range(400):
        try:
            schedule = Schedule.model_validate_json(json.dumps(random_schedule(numbers)))
            allowed.check(schedule)
        except (ValidationError, ValueError):
            continue
        passed += 1
        for step in range(20):
            value = schedule(Progress(step, total_steps=20, steps_per_epoch=4))
            assert allowed.holds(value) or any(math.isclose(value, end) for end in (0.04, 0.9, 0, 1)), schedule
    assert passed > 20

"""Every number of every command has a range by its use, and none outside it gets further than reading."""

import json
import math
import random
from collections.abc import Iterator
from functools import cache
from typing import get_args

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from benchmarks.settings import BenchmarkConfig
from benchmarks.step import Steps
from ssl_pipeline.commands.compare import CompareConfig
from ssl_pipeline.commands.embed import EmbedConfig
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, Config, ConfigError, Tree, load, recipe_files, validate
from ssl_pipeline.config.ranges import numbers_in, ranges_of
from ssl_pipeline.config.schema import annotation_at
from ssl_pipeline.data_tools.check_shards import CheckShards
from ssl_pipeline.data_tools.split_labels import SplitLabels
from ssl_pipeline.eval.clustering import ClusteringConfig
from ssl_pipeline.eval.dense_sets import DenseConfig
from ssl_pipeline.eval.few_shot import FewShotConfig
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.eval.label_free import LabelFreeConfig
from ssl_pipeline.eval.linear import LinearConfig
from ssl_pipeline.eval.retrieval import RetrievalConfig
from ssl_pipeline.eval.robustness import RobustnessConfig
from ssl_pipeline.eval.suite_measures import SuiteConfig
from ssl_pipeline.eval.table import TableConfig
from ssl_pipeline.packing.make_shards import MakeShards
from ssl_pipeline.schedule import Progress, Schedule
from tests.tiny import CONFIGS, tiny_settings

PROBES = (FewShotConfig, RetrievalConfig, LabelFreeConfig, DenseConfig, ClusteringConfig, RobustnessConfig)
EVALUATORS = (KnnConfig, LinearConfig, *PROBES, SuiteConfig, EmbedConfig, TableConfig, CompareConfig)
COMMANDS = (PretrainConfig, *EVALUATORS, MakeShards, CheckShards, SplitLabels, BenchmarkConfig, Steps)
NO_RANGE = {
    "Schedule.value": "its range is that of its use: Annotated[Schedule, InRange(...)]",
    "Schedule.final": "as value",
    "Schedule.start": "as value",
    "BackboneConfig.arguments": "timm's arguments, whose meaning timm knows",
    "KnnConfig.arguments": "as those of a backbone",
    "LinearConfig.arguments": "as those of a backbone",
    **{f"{probe.__name__}.arguments": "as those of a backbone" for probe in PROBES},
    "SuiteConfig.arguments": "as those of a backbone",
    "EmbedConfig.arguments": "as those of a backbone",
}
STRANGE: tuple[object, ...] = (math.nan, math.inf, -math.inf, 1e308, -1e308, 10**19, -(10**19), 10**400)
ORDINARY: tuple[object, ...] = (0, 1, -1, 0.5, 1.5, 2, 7, 255, 1e-300, 3e9, "5%", "1ep", "0ep", True, None)


def sections(annotation: object) -> Iterator[type[Config]]:
    """All settings classes in a type, those in their fields included."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    for part in get_args(annotation):
        yield from sections(part)


def holds_numbers(annotation: object) -> bool:
    """Whether a type holds numbers, or schedules of them."""
    return annotation in (int, float, Schedule) or any(map(holds_numbers, get_args(annotation)))


def fields() -> dict[str, FieldInfo]:
    found = {section for command in COMMANDS for section in sections(command)}
    return {f"{section.__name__}.{name}": field for section in found for name, field in section.model_fields.items()}


def test_every_number_of_every_command_has_a_range_or_a_reason():
    numeric = {name: field for name, field in fields().items() if holds_numbers(field.annotation)}
    assert len(numeric) > 150
    without = {name for name, field in numeric.items() if not ranges_of(field)}
    assert not without - NO_RANGE.keys(), "CONTRIBUTING.md (Style, 4) says how a number gets its range"
    assert not NO_RANGE.keys() - without, "these have one"


def test_defaults_lie_in_their_ranges():
    for name, field in fields().items():
        for allowed in ranges_of(field):
            default = field.get_default(call_default_factory=True)
            if not field.is_required() and (isinstance(default, Schedule) or list(numbers_in(default))):
                assert allowed.check(default) is default, name


@cache
def recipes() -> dict[str, Tree]:
    """The settings of one recipe of each method, with every key."""
    found: dict[str, Tree] = {}
    for name in recipe_files(RECIPES):
        config = load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)
        found.setdefault(config.method.name, json.loads(config.model_dump_json()))
    return found


OTHERS: dict[type[Config], Tree] = {
    KnnConfig: {"run": "runs/a", "train": "a", "test": "b"},
    LinearConfig: {"backbone": "resnet18", "train": "a", "test": "b", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    CompareConfig: {"recipes": ["digits_dino"], "train": "a", "test": "b", "output": "c"},
    MakeShards: {"source": "photos", "output": "data", "short_side": 320, "quality": 90},
    CheckShards: {"directory": "data"},
    SplitLabels: {"shards": "data", "output": "few", "labels_per_class": 5},
    BenchmarkConfig: {},
}
"""Settings of the other commands that have numbers."""


@cache
def settings() -> list[tuple[type[Config], Tree]]:
    """The settings of every command, with every key."""
    others = [(schema, json.loads(validate(schema, tree).model_dump_json())) for schema, tree in OTHERS.items()]
    return [*((PretrainConfig, tree) for tree in recipes().values()), *others]


def keys(tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all values that are no sections."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from keys(value, (*prefix, name))
        else:
            yield (*prefix, name)


def numeric_keys(schema: type[Config], tree: Tree) -> list[tuple[str, ...]]:
    return [key for key in keys(tree) if holds_numbers(annotation_at(schema, tree, key))]


def replaced(tree: Tree, key: tuple[str, ...], value: object) -> Tree:
    copy = json.loads(json.dumps(tree))
    section = copy
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = value
    return copy


def case(schema: type[Config], tree: Tree) -> str:
    return tree["method"]["name"] if schema is PretrainConfig else schema.__name__


@pytest.mark.parametrize("name", [*CONFIGS, *(schema.__name__ for schema in OTHERS)])
def test_no_number_is_endless_and_each_is_refused_by_its_full_name(name):
    ((schema, tree),) = (given for given in settings() if case(*given) == name)
    checked = 0
    for number, key in enumerate(numeric_keys(schema, tree)):
        if schema is PretrainConfig and tree["method"]["name"] != "dino" and key[0] != "method":
            continue  # the rest is the same for all methods
        for value in (STRANGE[number % len(STRANGE)], STRANGE[(number + 3) % len(STRANGE)]):
            with pytest.raises(ConfigError) as caught:
                validate(schema, replaced(tree, key, value))
            first = str(caught.value).splitlines()[0]
            place = first.partition(" ")[0].rstrip(":").partition("[")[0]
            assert ".".join(key).startswith(place), (key, value, first)
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("seed", range(20))
def test_random_numbers_anywhere_give_settings_or_a_sentence(seed):
    numbers, accepted = random.Random(seed), 0
    for _ in range(60):
        schema, tree = numbers.choice(settings())
        known = numeric_keys(schema, tree) if numbers.random() < 0.5 else list(keys(tree))
        for key in numbers.sample(known, k=min(numbers.choice([1, 1, 2, 5]), len(known))):
            value = numbers.choice(STRANGE + 10 * ORDINARY)
            tree = replaced(tree, key, [value] * numbers.randrange(4) if numbers.random() < 0.2 else value)
        try:
            config = validate(schema, tree)
        except ConfigError:  # nothing else may be raised
            continue
        accepted += 1
        if not isinstance(config, PretrainConfig):
            continue
        for schedule in (config.optim.effective_lr(512), config.optim.weight_decay):
            assert all(schedule(Progress(step, total_steps=9, steps_per_epoch=2.5)) >= -1e-12 for step in range(10))
    assert accepted


MOMENTA = [
    (name, setting) for name, config in CONFIGS.items() for setting in config.model_fields if "momentum" in setting
]


@pytest.mark.parametrize(("name", "setting"), MOMENTA)
def test_an_average_that_never_moves_is_refused(name, setting):
    assert len(MOMENTA) > 20
    is_schedule = isinstance(getattr(CONFIGS[name](**tiny_settings(name)), setting), Schedule)
    still = ({"value": 1}, {"value": 1, "final": 1}) if is_schedule else (1,)
    moving = ({"value": 0.9, "final": 1}, {"value": 1, "warmup": 5}, {"value": 0}) if is_schedule else (0.999, 0)
    for value in still:
        with pytest.raises(ValidationError, match=r"below 1|less than 1"):
            CONFIGS[name](**tiny_settings(name) | {setting: value})
    for value in moving:
        CONFIGS[name](**tiny_settings(name) | {setting: value})


BAD = [
    ("method.teacher_momentum=1.5", "method.teacher_momentum.value must be between 0 and 1. Got 1.5."),
    ("method.teacher_momentum.final=1.001", "method.teacher_momentum.final must be between 0 and 1. Got 1.001."),
    ("method.teacher_momentum=1", "method.teacher_momentum.value must be below 1: an average that keeps all of itself"),
    ("method.centre_momentum=1", "method.centre_momentum must be below 1. Got 1."),
    ("method.teacher_temperature=-1", "method.teacher_temperature.value must be above 0. Got -1."),
    ("method.teacher_temperature=0", "method.teacher_temperature.value must be above 0. Got 0."),
    ("method.student_temperature=0", "method.student_temperature must be above 0. Got 0."),
    ("optim.weight_decay=-0.5", "optim.weight_decay.value must be between 0 and 100. Got -0.5."),
    ("optim.lr.final=-1", "optim.lr.final must be between 0 and 1000. Got -1."),
    ("optim.lr=1e13", "optim.lr.value must be between 0 and 1000. Got 10000000000000."),
    ("optim.lr={value: -1e13, warmup: 5%}", "optim.lr.value must be between 0 and 1000. Got -10000000000000."),
    ("optim.clip_norm=null", "optim.clip_norm must be a number for clip_each=true, "),
    ("optim.betas=0.9,1", "optim.betas must be at least 0 and below 1. Got 1."),
    (
        "data.mean=[123.675,116.28,103.53]",
        "data.mean must be for colours from 0 to 1, not to 255: write [0.485,0.456,0.406]. Got [123.675,116.28,10",
    ),
    (
        "data.std=[58.395,57.12,57.375]",
        "data.std must be for colours from 0 to 1, not to 255: write [0.229,0.224,0.225]. Got [58.395,57.12,57.375].",
    ),
    ("data.std=[0,0,0]", "data.std must be between 0.001 and 2. Got 0."),
    ("data.mean=[0.5,0.5,-5]", "data.mean must be between -1 and 1. Got -5."),
    ("data.block_shards=10000000000000000000", "data.block_shards must be at most 1000000. Got 10000000000000000000."),
    ("data.workers=100000", "data.workers must be at most 1024. Got 100000."),
    ("method.head_hidden_dim=3000000", "method.head_hidden_dim must be at most 1048576. Got 3000000."),
    ("augment.global.scale=[0.9,0.1]", "augment.global.scale must be an increasing pair, each above 0 and at most 1. "),
    ("augment.global.blur_sigma=[2,0.1]", "augment.global.blur_sigma must be an increasing pair, each above 0 and at "),
    ("augment.global.aspect=[0,1]", "augment.global.aspect must be an increasing pair, each between 0.01 and 100. "),
    ("augment.global.size=100000", "augment.global.size must be between 1 and 8192. Got 100000."),
    ("train.steps=0", "train.steps must be above 0. Got 0."),
    ("knn.temperature=0", "knn.temperature must be above 0. Got 0."),
]


@pytest.mark.parametrize(("argument", "sentence"), BAD)
def test_a_bad_number_is_one_sentence_before_anything_is_read(argument, sentence):
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, ["recipe=digits_dino", "knn={every: 1ep, train: a, val: b}", argument], recipes=RECIPES)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-0.125, 1.25)])  # colours as they are; 0.8 * x + 0.1
def test_other_normalisations_than_by_statistics_are_fine(mean, std):
    argv = ["recipe=digits_dino", f"data.mean=[{mean},{mean},{mean}]", f"data.std=[{std},{std},{std}]"]
    data = load(PretrainConfig, argv, recipes=RECIPES).data
    assert (data.mean, data.std) == ((mean,) * 3, (std,) * 3)

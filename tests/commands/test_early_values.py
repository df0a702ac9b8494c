"""A wrong value is told from the sources alone, as the schema would tell it; a right one never is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ssl_pipeline.commands.early_values import wrong_values
from ssl_pipeline.commands.key_names import sections_in_sources
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, Value, load, read_recipe, recipe_files, sentences_of
from ssl_pipeline.config.schema import alternatives, walk

SECTIONS = sections_in_sources()
OWN_TYPES = ("data.mean", "data.std", "augment.NAME.")
"""What a class that needs torch reads, or a section that is put together at import."""


def leaves(tree: Value, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and prefix != "backbone.arguments.":
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}{name}.")
    elif prefix:
        yield prefix[:-1], tree if isinstance(tree, str) else json.dumps(tree)


@pytest.mark.parametrize("recipe", list(recipe_files(RECIPES)))
def test_no_value_of_a_recipe_is_wrong(recipe):
    tree = read_recipe(recipe, RECIPES)
    given = list(leaves(tree))
    assert len(given) > 10
    assert wrong_values(given, tree, SECTIONS) == []


@pytest.mark.parametrize("recipe", ["digits_simclr", "mae_vitb16", "cifar10_fixmatch_wrn28_2"])
@pytest.mark.parametrize("wrong", ["abc", "-1e30", "1e400", "[1,2,3,4,5,6,7]"])
def test_what_is_told_is_what_the_schema_tells(recipe, wrong):
    tree = read_recipe(recipe, RECIPES)
    keys = [key for key, field in walk(PretrainConfig, tree) if {int, float} & set(alternatives(field.annotation))]
    keys = [key for key in keys if not key.startswith(OWN_TYPES)]
    told = wrong_values([(key, wrong) for key in keys], tree, SECTIONS)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, [f"recipe={recipe}", *(f"{key}={wrong}" for key in keys)], recipes=RECIPES)
    assert told
    assert sorted(told) == sorted(
        sentence for sentence in sentences_of(error.value) if sentence.startswith(tuple(keys))
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("optim.lr.value=abc", "optim.lr.value must be a valid number. Got 'abc'."),
        ("optim.lr=-1", "optim.lr.value must be between 0 and 1000. Got -1."),
        ("optim.betas=[0.9,1]", "optim.betas must be at least 0 and below 1. Got 1."),
        ("data.batch_size=-3", "data.batch_size must be at least 1. Got -3."),
        ("train.epochs=0", "train.epochs must be above 0. Got 0."),
        ("train.save_every=101%", "train.save_every: a share of the run is at most 100%. Got 101%."),
        ("train.precision=fp8", "train.precision must be one of bf16, fp16, no. Got 'fp8'."),
        ("method.temperature=0", "method.temperature must be above 0. Got 0."),
        ("optim.nesterov=yes", None),
    ],
)
def test_types_ranges_and_choices(given, sentence):
    key, _, text = given.partition("=")
    tree = read_recipe("digits_simclr", RECIPES)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, ["recipe=digits_simclr", given], recipes=RECIPES)
    assert wrong_values([(key, text)], tree, SECTIONS) == list(sentences_of(error.value))
    assert sentence is None or sentences_of(error.value) == (sentence,)


@pytest.mark.parametrize("given", [("optim.lr.warmup", "3ep"), ("knn.every", "1ep"), ("output", "~/x"), ("seed", "0")])
def test_a_right_value_says_nothing_of_what_is_missing_beside_it(given):
    assert wrong_values([given], {}, SECTIONS) == []


def test_keys_of_the_command_over_it_are_left_to_it():
    assert wrong_values([("train", "1"), ("seed", "x")], {}, SECTIONS, own=("train", "seed")) == []


@pytest.mark.parametrize("recipe", ["digits_simclr", "dino_vits16"])
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("knn=false", "Write knn=null."),
        ("backbone=resnet18", "Write backbone.name=resnet18."),
        ("method=simclr", "Write method.name=simclr."),
        ("optim=sgd", "Write optim.name=sgd."),
        ("train=3", "Got 3."),
        ("data.labelled=x", "Got 'x'."),
    ],
)
def test_a_value_in_place_of_a_section(recipe, given, advice):
    key, _, text = given.partition("=")
    tree = read_recipe(recipe, RECIPES)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, [f"recipe={recipe}", given], recipes=RECIPES)
    (told,) = wrong_values([(key, text)], tree, SECTIONS)
    assert told.endswith(advice)
    if "keys" in told:  # of a section that is put together at import the sources show some
        assert told.partition(" with the keys ")[0] == sentences_of(error.value)[0].partition(" with the keys ")[0]
    else:
        assert told == sentences_of(error.value)[0]


def test_an_unknown_method_is_told():
    tree = read_recipe("dino_vits16", RECIPES) | {"method": {"name": "simclrr"}}  # as `start` puts it there
    (told,) = wrong_values([("method.name", "simclrr")], tree, SECTIONS)
    assert told.startswith("method.name must be one of adamatch, barlow_twins, ")
    assert told.endswith("Got 'simclrr'. Did you mean 'simclr'?")


@pytest.mark.parametrize("given", [("knn", "null"), ("optim.lr", "0.1"), ("optim", "{name: sgd}"), ("knn", "{k: 3}")])
def test_a_section_takes_null_a_shorthand_and_keys(given):
    assert wrong_values([given], read_recipe("dino_vits16", RECIPES), SECTIONS) == []


@pytest.mark.parametrize(
    "given",
    [
        "augment.global.flip_prob=1.5",
        "augment.global.scale=[1.0,0.4]",
        "augment.local.count=0",
        "augment.global.size=abc",
        "augment.global.blur_kernel=x",
        "augment.global.jitter_prob=[0.5,2]",
        "augment.global.crop=center",
        "augment.global=2",
    ],
)
def test_values_of_views(given):
    key, _, text = given.partition("=")
    tree = read_recipe("dino_vits16", RECIPES)
    (told,) = wrong_values([(key, text)], tree, SECTIONS)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, ["recipe=dino_vits16", given], recipes=RECIPES)
    (later,) = sentences_of(error.value)
    assert told.partition(" keys ")[0] == later.partition(" keys ")[0]
    assert (told == later) == (" keys " not in told)


def test_views_that_are_right_say_nothing():
    given = [("augment.global.size", "96"), ("augment.local", "null"), ("augment.else.blur_prob", "[0.1,0.2]")]
    assert wrong_values(given, read_recipe("dino_vits16", RECIPES), SECTIONS) == []


@pytest.mark.parametrize("key", ["augment.global.mean", "augment", "backbone.arguments.img_size"])
def test_what_is_no_yaml_is_told_of_keys_whose_types_need_torch(key):
    (told,) = wrong_values([(key, "[8")], read_recipe("dino_vits16", RECIPES), SECTIONS)
    assert told.startswith(f"{key}=[8, line 1: not valid YAML")

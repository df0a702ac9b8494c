"""A mistyped key is told from the sources alone, as the schema would tell it; a right one never is."""

from __future__ import annotations

import pytest

from ssl_pipeline.commands.key_names import sections_in_sources, unknown_keys
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, Config, ConfigError, load, read_recipe, recipe_files, sentences_of
from ssl_pipeline.config.schema import complete, walk
from tests.tiny import CONFIGS

SECTIONS = sections_in_sources()


@pytest.mark.parametrize("recipe", list(recipe_files(RECIPES)))
def test_no_key_of_a_recipe_is_unknown(recipe):
    tree = read_recipe(recipe, RECIPES)
    keys = [key for key, _ in walk(PretrainConfig, complete(PretrainConfig, tree))]
    inside = [f"{key}.value" for key in ("optim.lr", "optim.weight_decay")]
    free = ["backbone.arguments.anything", "augment.other.size", "augment.view.size", "data.labelled.keep"]
    assert unknown_keys([*keys, *inside, *free, "recipe"], tree, SECTIONS) == []


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_no_key_of_a_method_is_unknown(method):
    keys = [f"method.{name}" for name in CONFIGS[method].model_fields]
    assert unknown_keys(keys, {"method": {"name": method}}, SECTIONS) == []


@pytest.mark.parametrize(
    "key",
    [
        "imags",
        "optm.lr",
        "optim.learning_rate",
        "optim.lr.valeu",
        "batch_size",
        "method.tempratur",
        "lr",
        "a.b.c",
        "augment.view.sise",
    ],
)
def test_a_typo_is_told_in_the_words_of_the_schema(key):
    (told,) = unknown_keys([key], read_recipe("digits_simclr", RECIPES), SECTIONS)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, ["recipe=digits_simclr", f"{key}=1"], recipes=RECIPES)
    assert told == sentences_of(error.value)[0]


def test_a_typo_after_a_right_part_is_found_in_sections_of_sections():
    assert unknown_keys(["data.labelled.kep"], {}, SECTIONS) == [
        "Unknown key 'data.labelled.kep'. Did you mean 'data.labelled.keep'?"
    ]


def test_classes_and_fields_of_the_sources_are_those_of_the_schema():
    fields = {name: set(section.model_fields) for name, section in _sections_of(PretrainConfig).items()}
    for name, keys in fields.items():
        assert set(SECTIONS[name].keys) <= keys, name


def _sections_of(schema: type[Config]) -> dict[str, type[Config]]:
    parts = (field.annotation for field in schema.model_fields.values())
    return {part.__name__: part for part in parts if isinstance(part, type) and issubclass(part, Config)}


def test_a_command_over_it_has_keys_of_its_own():
    own = ("weights", "train", "test")
    assert unknown_keys(["weights", "test", "train", "train.steps"], {}, SECTIONS, own=own) == []
    assert unknown_keys(["weigths"], {}, SECTIONS, own=own) == ["Unknown key 'weigths'. Did you mean 'weights'?"]
    assert unknown_keys(["weights"], {}, SECTIONS)[0].startswith("Unknown key 'weights'.")

"""`key=value` arguments over a recipe, read into plain YAML values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config.base import Config, ConfigError, Location, Tree, Value
from ssl_pipeline.config.recipes import read_recipe
from ssl_pipeline.config.yaml_text import read_yaml


@dataclass(frozen=True)
class Arguments:
    """A command line: the tree of its values over the recipe's, and by key their texts and what is no YAML in them."""

    tree: Tree
    texts: dict[Location, str]
    unreadable: dict[Location, str]


def read_arguments(schema: type[Config], argv: Sequence[str], recipes: Path | None) -> Arguments:
    """Recipe and `key=value` arguments as plain values; a value that is no YAML is taken as text and noted."""
    pairs = _pairs(schema, argv)
    tree: Tree = {}
    if recipes is not None:
        names = [text for key, text in pairs if key == "recipe"]
        pairs = [(key, text) for key, text in pairs if key != "recipe"]
        if len(names) > 1:
            raise ConfigError(f"recipe= is given {len(names)} times; one run has one recipe.")
        if names:
            tree = read_recipe(names[0], recipes)
            tree["recipe"] = names[0]

    arguments = Arguments(tree, {}, {})
    for key, text in pairs:
        location = tuple(key.split("."))
        if location in arguments.texts:
            raise ConfigError(f"{key} is given twice: '{arguments.texts[location]}' and '{text}'.")
        arguments.texts[location] = text
        try:
            value = read_yaml(text, where=f"{key}={text}")
        except ConfigError as error:
            arguments.unreadable[location] = str(error)
            value = text
        _assign(tree, location, value)
    return arguments


def _pairs(schema: type[Config], argv: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    mistakes = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if equals and all(key.split(".")) and not key.startswith("-"):
            pairs.append((key, text))
        elif schema.positional and not equals and not key.startswith("-"):
            pairs.append((schema.positional, argument))
        else:
            hint = f" Try {key.lstrip('-')}={text or 'VALUE'}." if key.startswith("-") else ""
            mistakes.append(f"'{argument}' is not of the form key=value.{hint}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return pairs


def _assign(tree: Tree, location: Location, value: Value) -> None:
    """Set one dotted key; a bare value over a schedule's section sets its `value`."""
    *parents, last = location
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = {} if child is None else {"value": child}
            tree[name] = child
        tree = child
    old = tree.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, item in value.items():
            _assign(old, (name,), item)
    elif isinstance(old, dict) and "value" in old and value is not None:
        old["value"] = value
    else:
        tree[last] = value

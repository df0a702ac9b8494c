"""`key=value` arguments over a recipe, read into plain YAML values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from textwrap import fill
from typing import TypeVar, get_args, get_origin

from ssl_pipeline.config.base import Config, ConfigError, Location, SettingsError, Tree, Value, is_there
from ssl_pipeline.config.other_name import drop_of_other_name
from ssl_pipeline.config.printing import note
from ssl_pipeline.config.recipes import read_recipe
from ssl_pipeline.config.schema import alternatives, annotation_at, is_free_mapping, section_of, state_in_full
from ssl_pipeline.config.yaml_text import read_yaml

Leaf = TypeVar("Leaf")

OUTSIDE_BRACES = re.compile(r",(?![^{}]*\})")


def read_arguments(
    schema: type[Config], argv: Sequence[str], recipes: Path | None, overrides: Mapping[str, Value] | None = None
) -> Tree:
    """Recipe and `key=value` arguments as plain values; raises ConfigError that lists all that cannot be read.

    overrides: values by their dotted keys, which count like arguments and come after them.
    """
    pairs, recipe = pairs_and_recipe(argv, recipes, positional=schema.positional)
    tree = state_in_full(schema, recipe)
    assert isinstance(tree, dict)
    return put_over(schema, tree, pairs, overrides)


def put_over(
    schema: type[Config], tree: Tree, pairs: Sequence[tuple[str, str]], overrides: Mapping[str, Value] | None = None
) -> Tree:
    """The settings `tree` with keys and texts put over them; raises ConfigError that lists all that cannot be read."""
    given: dict[str, str] = {}
    places: set[Location] = set()
    mistakes = []
    recipe = deepcopy(tree)
    asked: list[tuple[str, str | None]] = [*pairs, *((key, None) for key in overrides or {})]
    for key, text in sorted(asked, key=lambda pair: not pair[0].endswith(".name")):  # names say what other keys mean
        location = tuple(key.split("."))
        if text is not None and key in given:
            several = (
                f" It takes several at once as {key}=A,B." if _lists(annotation_at(schema, tree, location)) else ""
            )
            raise ConfigError(f"{key} is given twice: '{given[key]}' and '{text}'.{several}")
        given[key] = "" if text is None else text
        try:
            annotation = annotation_at(schema, tree, location)
            value = (overrides or {})[key] if text is None else _value(annotation, key, text)
            if dropped := drop_of_other_name(schema, tree, location, value, [key for key, _ in asked]):
                note(dropped)
            if isinstance(value, dict) and is_free_mapping(annotation_at(schema, tree, location)):
                assign(tree, location, None)  # the new mapping replaces that of the recipe
            assign(tree, location, value)
            places |= set(_places(location, value))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise SettingsError(*mistakes)
    for told in schema.fit_recipe(tree, given.keys(), recipe):
        note(told)
    for place in places:
        _drop_replaced(schema, tree, place, places)
    return tree


def leaves(tree: Mapping[str, Leaf], start: str = "") -> Iterator[tuple[str, Leaf]]:
    """Each value of nested sections by its dotted key, of settings or of a protocol."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _places(location: Location, value: Value) -> Iterator[Location]:
    """The location, and those of all values in a section that is given as a whole; null is not a value."""
    if value is not None:
        yield location
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _places((*location, name), item)


def _drop_replaced(schema: type[Config], tree: Tree, place: Location, given: set[Location]) -> None:
    """Take out of the recipe what a given key says in another way (`one_of` of its section)."""
    *parents, key = place
    inside: Value = tree
    for name in parents:
        inside = inside.get(name) if isinstance(inside, dict) else None
    section = section_of(annotation_at(schema, tree, tuple(parents)), inside)
    if section is None or key not in section.one_of or not isinstance(inside, dict):
        return
    for other in section.one_of:
        if (*parents, other) not in given:
            inside.pop(other, None)


def pairs_and_recipe(
    argv: Sequence[str], recipes: Path | None, *, positional: str | None = None
) -> tuple[list[tuple[str, str]], Tree]:
    """Keys and texts, without `recipe=NAME`, and the settings of that recipe; all that can be read without a schema."""
    pairs = _pairs(positional, argv)
    if recipes is None:
        return pairs, {}
    names = [text for key, text in pairs if key == "recipe"]
    if len(names) > 1:
        raise ConfigError(f"recipe= is given {len(names)} times; one run has one recipe.")
    tree = read_recipe(names[0], recipes) | {"recipe": names[0]} if names else {}
    return [(key, text) for key, text in pairs if key != "recipe"], tree


def keys_of(argv: Sequence[str]) -> dict[str, str]:
    """The texts of `key=value` arguments by their keys; raises ConfigError for a key that is given twice."""
    found: dict[str, str] = {}
    for key, text in _pairs(None, argv):
        if key in found:
            raise ConfigError(f"{key} is given twice: '{found[key]}' and '{text}'.")
        found[key] = text
    return found


def _pairs(positional: str | None, argv: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    mistakes = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.partition("=")
        if key.startswith("-") and not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            text = rest.pop(0)  # --key value
        if equals and all(key.split(".")) and not key.startswith("-"):
            pairs.append((key, text))
        elif positional and not equals and not key.startswith("-"):
            pairs.append((positional, argument))
        else:
            hint = f" Try {key.lstrip('-')}={text or 'VALUE'}." if key.startswith("-") else ""
            given = f"{argument} {text}" if text and not equals else argument
            mistakes.append(f"'{given}' is not of the form key=value.{hint}")
    if mistakes:
        raise SettingsError(*mistakes)
    return pairs


def _value(annotation: object, key: str, text: str) -> Value:
    """YAML, but for what only the command line needs: a text key takes the text as it is, `10,20` is a list."""
    kinds, lists = alternatives(annotation), _lists(annotation)
    if kinds and all(kind in (str, Path) or (kind in lists and get_args(kind)[0] is str) for kind in kinds):
        found = None if text in ("", "~", "null") else _texts(key, text) if lists else text
        return [found] if isinstance(found, str) and len(lists) == len(kinds) else found
    value = read_yaml(text, where=f"{key}={text}")
    if lists:
        if isinstance(value, str) and "," in value:
            return [read_yaml(part, where=key) for part in value.split(",")]
        if isinstance(value, int | float | str) and len(kinds) == 1:
            return [value]
    return value


def _lists(annotation: object) -> list[object]:
    """The forms of a setting that hold several values."""
    return [kind for kind in alternatives(annotation) if get_origin(kind) is tuple]


def _texts(key: str, text: str) -> Value:
    """A text as it is, or several between commas, with or without [ ]; quotes are YAML's, braces keep commas.

    What there is by this name, or in a folder of such a name, is one path, whatever letters it has.
    """
    if _is_one_place(text):
        return text
    if text.startswith("[") and any(quote in text for quote in "'\""):
        return read_yaml(text, where=f"{key}={text}")
    bracketed = text.startswith("[") and text.endswith("]")
    parts = [part.strip() for part in OUTSIDE_BRACES.split(text[1:-1] if bracketed else text)]
    return list(filter(None, parts)) if bracketed or len(parts) > 1 else text


def _is_one_place(text: str) -> bool:
    """Whether a text with commas or brackets is a path: one that there is, or a pattern in a folder of such a name."""
    folder = str(Path(text).parent)
    return bool(re.search(r"[,\[]", text)) and (is_there(text) or ("," in folder and is_there(folder)))


def assign(tree: Tree, location: Location, value: Value) -> None:
    """Set one dotted key; a bare value over a schedule's section sets its `value`."""
    *parents, last = location
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {} if child is None else {"value": child}
        tree = child
    old = tree.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, item in value.items():
            assign(old, (name,), item)
    elif isinstance(old, dict) and "value" in old and value is not None:
        old["value"] = value
    else:
        tree[last] = value


def origins(schema: type[Config], argv: Sequence[str], recipes: Path | None) -> str:
    """Comments that say where the values of settings come from."""
    pairs, recipe = pairs_and_recipe(argv, recipes, positional=schema.positional)
    given = [key for key, _ in pairs]
    own = [
        key
        for key, _ in leaves(recipe)
        if key != "recipe" and not any(key == other or key.startswith(f"{other}.") for other in given)
    ]
    lines = [("the command line", given), (f"recipe {recipe.get('recipe')}", own)]
    told = [
        fill(f"# from {source}: {', '.join(keys)}", 110, subsequent_indent="#   ") for source, keys in lines if keys
    ]
    return "\n".join([*told, "# all else: defaults, or what these bring along"])

"""The help page: every key with its type, its range or allowed values, its default and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from ssl_pipeline.config.arguments import read_arguments
from ssl_pipeline.config.base import Config, ConfigError, Tree, nearest
from ssl_pipeline.config.descriptions import described_fields
from ssl_pipeline.config.ranges import InRange, ranges_of
from ssl_pipeline.config.recipes import recipe_files
from ssl_pipeline.config.schema import alternatives, fixed_length, sections_in, tags_of, walk
from ssl_pipeline.config.yaml_text import YamlDumper

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", dict: "section"}
ANY = "NAME"  # placeholder for names that a user chooses, of groups of views for instance


class _Key(NamedTuple):
    """A key with its field and ranges; `inner` ones lie in a section that a bare value sets as well (schedules)."""

    path: str
    field: FieldInfo
    ranges: list[InRange]
    inner: bool = False


def help_page(
    schema: type[Config], argv: Sequence[str], places: Sequence[str], command: str, recipes: Path | None
) -> str:
    """All keys, or those of the `places` asked for: sections, groups or single keys.

    Raises ConfigError for an unknown place.
    """
    tree = read_arguments(schema, argv, recipes)
    keys = list(_keys(schema, tree))
    asked = [place for place in places if _is_known(place, keys, schema)]
    if asked:
        chosen = [key for key in keys if any(_is_in(key, place) for place in asked)]
        return "\n".join(line for key in chosen for line in _entry(key))
    begin = f"usage: {command}{' recipe=NAME' if recipes else ''} [key=value ...]"
    lines = [f"{begin} [--help [SECTION]] [--print] [--debug]", "", (schema.__doc__ or "").strip(), ""]
    if recipes:
        lines += [f"recipes: {', '.join(recipe_files(recipes))}", ""]
    section = ""
    for key in keys:
        name = key.path.partition(".")[0] if "." in key.path or _tags(key.field) else ""
        if name != section:
            text = described_fields(schema)[name].description if name else None
            lines += ["", *([f"{name}: {' '.join(text.split())}"] if text else [])]
            section = name
        lines += [] if key.inner else _entry(key)
    return "\n".join(lines)


def _keys(schema: type[Config], tree: Tree) -> Iterator[_Key]:
    for path, field in walk(schema, tree):
        ranges = ranges_of(field)
        yield _Key(path, field, ranges)
        for section in sections_in(field.annotation) if not _tags(field) else ():
            for name, inner in described_fields(section).items():
                inherited = ranges if float in alternatives(inner.annotation) else []
                yield _Key(f"{path}.{name}", inner, ranges_of(inner) or inherited, inner=True)


def _is_known(place: str, keys: Sequence[_Key], schema: type[Config]) -> bool:
    if any(_is_in(key, place) for key in keys):
        return True
    if schema.positional:  # a value, not a place
        return False
    names = dict.fromkeys(name for key in keys for name in (key.path.partition(".")[0], key.path))
    raise ConfigError(f"There is no key or section '{place}'.{nearest(place, list(names))}")


def _is_in(key: _Key, place: str) -> bool:
    """Whether a key is the place, or lies in it; the inner ones show where their own section is asked for."""
    parts, wanted = key.path.split("."), place.split(".")
    if len(parts) - len(wanted) not in ((0, 1) if key.inner else range(len(parts))):
        return False
    return all(part in (ANY, name) for part, name in zip(parts, wanted, strict=False))


def _entry(key: _Key) -> list[str]:
    path, field = key.path, key.field
    if tags := _tags(field):
        return [f"  {path}.name: one of {', '.join(tags)}; its keys: --help with recipe= or {path}.name="]
    default = "" if field.is_required() else _plain(field.get_default(call_default_factory=True))
    lines = [f"  {path} ({_kind(key)}; {f'default: {default}' if default else 'required'})"]
    lines += [f"      {' '.join(field.description.split())}"] if field.description else []
    for section in sections_in(field.annotation):  # a schedule: a bare value or its keys
        lines.append(f"      One value, or the keys {', '.join(f'.{name}' for name in section.model_fields)}.")
    return lines


def _tags(field: FieldInfo) -> list[str]:
    """The values of `name` among which a union of sections is chosen."""
    sections = sections_in(field.annotation)
    return [tag for section in sections for tag in tags_of(section)]


def _kind(key: _Key) -> str:
    """What a key takes: type, allowed values, range."""
    kinds = list(dict.fromkeys(map(_type_in_words, alternatives(key.field.annotation))))
    if type(None) in get_args(key.field.annotation):
        kinds.append("null")
    ranges = list(dict.fromkeys(map(str, key.ranges)))
    return ", ".join(ranges if any(found.increasing for found in key.ranges) else [" or ".join(kinds), *ranges])


def _type_in_words(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) is tuple:
        words = _type_in_words(alternatives(get_args(annotation)[0])[0])
        count = fixed_length(annotation)
        several = words if words.startswith("one of ") else f"{words}s"
        return f"{count} {several}" if count else f"list of {several}"
    kind = get_origin(annotation) or annotation
    return next((words for known, words in WORDS.items() if kind is known), getattr(kind, "__name__", "").lower())


def _plain(value: object) -> str:
    """A value in one line of YAML, as it would be written in a recipe."""
    if isinstance(value, Config):
        value = value.model_dump(mode="json", exclude_defaults=True)
    elif not isinstance(value, bool | int | float | str | None):
        value = TypeAdapter(type(value)).dump_python(value, mode="json")
    text = yaml.dump(value, Dumper=YamlDumper, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()

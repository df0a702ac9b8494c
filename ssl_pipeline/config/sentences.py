"""What the user reads: one sentence per mistake, and the help page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ssl_pipeline.config.schema import Config, Value, annotation_of, kinds_of, nearest, section_of, value_at, walk
from ssl_pipeline.config.sources import read_arguments, recipe_files
from ssl_pipeline.config.yaml_text import YamlDumper

TOO_DEEP = "The settings are nested too deeply."


def mistakes(schema: type[Config], data: Value, error: ValidationError) -> list[str]:
    """One sentence per mistake: where, what is needed, what came, what to try."""
    by_place: dict[str, tuple[_Place, list[ErrorDetails]]] = {}
    for item in error.errors():
        place = _place(schema, data, item["loc"])
        by_place.setdefault(place.where, (place, []))[1].append(item)
    return [
        _suggestion(schema, data, place) if first["type"] == "extra_forbidden" else _sentence(place, [first, *others])
        for place, (first, *others) in by_place.values()
    ]


class _Place(NamedTuple):
    """Where a mistake is, without pydantic's union tags, the annotation that applies there and the section it chose.

    For an unknown key both are those of the section it was put into.
    """

    path: tuple[str, ...]
    annotation: object
    section: type[Config] | None

    @property
    def where(self) -> str:
        return ".".join(self.path)


def _sentence(place: _Place, errors: Sequence[ErrorDetails]) -> str:
    """Several errors at one place come from the members of a union: what they need is joined with "or"."""
    where, kind, got, context = place.where, errors[0]["type"], errors[0]["input"], errors[0].get("ctx", {})
    (_, sections, entry, length), tags = kinds_of(place.annotation), kinds_of(place.annotation).tags
    if kind in ("missing", "too_long") and length and isinstance(got, list):
        return f"{where} must have {length} values. Got {len(got)}."
    if kind == "missing":
        inside = ".KEY" if sections else ".NAME.KEY" if entry is not None else ""
        return f"{where} is missing: set {where}{inside}=..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = str(got.get("name", "")) if isinstance(got, dict) else str(got)
        return f"{where}.name must be one of {', '.join(tags)}. Got '{name}'.{nearest(name, tags)}"
    if len(sections) > 1 and not isinstance(got, dict):
        return f"{where} is a section: set {where}.name to one of {', '.join(tags)}. Got {got!r}."
    if kind == "value_error":
        reason = str(context["error"])
        starts_with_key = place.section is not None and re.split(r"[ .]", reason)[0] in place.section.model_fields
        return f"{where}.{reason}" if where and starts_with_key else f"{where}: {reason}".removeprefix(": ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        names = ", ".join(name for section in sections for name in section.model_fields)
        return f"{where} is a section with the keys {names or 'you choose'}. Got {got!r}."
    if kind == "json_invalid":
        return TOO_DEEP
    if kind != "literal_error" and isinstance(got, dict) and got and not sections:
        inner = next((name for name in got if name != "value"), "value")  # `value` stands for what was there before
        return f"Unknown key '{where}.{inner}'. {where} takes a value, it is no section."
    if any(error["type"] == "value_error" for error in errors):
        errors = errors[:1]
    needed = " or ".join(dict.fromkeys(map(_needed, errors)))
    return f"{where} must be {needed}. Got {got!r}.{nearest(str(got), _choices(errors[0]))}"


def _choices(error: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"]) if error["type"] == "literal_error" else []


def _needed(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        return f"one of {', '.join(_choices(error))}"
    return error["msg"].removeprefix("Input should be ").removeprefix("String should match ")


def _place(schema: type[Config], data: Value, loc: Sequence[int | str]) -> _Place:
    path: list[str] = []
    annotation: object = schema
    tag_follows = False
    for part in loc:
        if tag_follows:
            tag_follows = False
            continue
        section, inner = section_of(annotation, data), annotation_of(annotation, data, str(part))
        inside = isinstance(data, dict) and part in data
        if isinstance(part, int):
            if isinstance(data, list) and part < len(data):  # otherwise an item is missing: a mistake of the list
                path[-1] = f"{path[-1]}[{part}]"
        elif inner is not None and (inside or section is not None):
            annotation, data = inner, value_at(data, part)
            tag_follows = len(kinds_of(annotation).sections) > 1
            path.append(part)
        elif inside and section is not None:
            return _Place((*path, part), annotation, section)
        # all else is the type of a union's member
    return _Place(tuple(path), annotation, section_of(annotation, data))


def _suggestion(schema: type[Config], data: Value, place: _Place) -> str:
    known = list(place.section.model_fields) if place.section is not None else []
    *parents, key = place.path
    elsewhere = [path for path, _ in walk(schema, data) if path.rpartition(".")[2] == key]
    if nearest(key, known):
        hint = nearest(place.where, [".".join((*parents, name)) for name in known])
    else:
        hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else f" Known here: {', '.join(known)}"
    return f"Unknown key '{place.where}'.{hint}"


def help_page(schema: type[Config], argv: Sequence[str], command: str, recipes: Path | None) -> str:
    tree = read_arguments(schema, argv, recipes)
    usage = f"usage: {command}{' recipe=NAME' if recipes else ''} [key=value ...] [--print] [--debug]"
    lines = [usage, "", (schema.__doc__ or "").strip(), ""]
    if recipes:
        lines += [f"recipes: {', '.join(recipe_files(recipes))}", ""]
    for path, field in walk(schema, tree):
        kinds = kinds_of(field.annotation)
        if kinds.tags:
            names = ", ".join(kinds.tags)
            lines.append(f"  {path}.name: one of {names}; its keys: --help with recipe= or {path}.name=")
            continue
        default = "" if field.is_required() else _plain(field.get_default(call_default_factory=True))
        lines.append(f"  {path} ({f'default: {default}' if default else 'required'})")
        lines += [f"      {' '.join(field.description.split())}"] if field.description else []
        for section in kinds.sections:  # a schedule: a bare value or its keys
            lines.append(f"      One value, or the keys {', '.join(f'.{name}' for name in section.model_fields)}.")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """A value in one line of YAML, as it would be written in a recipe."""
    plain = TypeAdapter(type(value)).dump_python(value, mode="json", exclude_defaults=True)
    text = yaml.dump(plain, Dumper=YamlDumper, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()

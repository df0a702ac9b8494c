"""What the user reads: one sentence per mistake, and the help page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from ssl_pipeline.config.arguments import read_arguments
from ssl_pipeline.config.base import Config, Location, Value, nearest
from ssl_pipeline.config.schema import mapping_value, section_of, sections_in, tags_of, walk


def mistakes(schema: type[Config], data: Value, error: ValidationError) -> list[str]:
    """One sentence per mistake: where, what is needed, what came, what to try."""
    by_place: dict[str, list[str]] = {}
    for item in error.errors():
        parents, key, annotation = _place(schema, data, item["loc"])
        where = ".".join((*parents, key) if key else parents)
        kind, got = item["type"], item["input"]
        if kind == "extra_forbidden":
            section = sections_in(annotation)
            sentence = f"Unknown key '{where}'.{_suggest(schema, section, parents, key)}"
        elif kind == "missing":
            sentence = f"{where} is missing: set {where}=..."
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            tags = [tag for section in sections_in(annotation) for tag in tags_of(section)]
            name = str(got.get("name", "")) if isinstance(got, dict) else str(got)
            sentence = f"{where}.name must be one of {', '.join(tags)}. Got '{name}'.{nearest(name, tags)}"
        elif kind == "value_error":
            reason = str(item["ctx"]["error"])
            starts_with_key = reason.split(" ", 1)[0].split(".")[0] in _field_names(annotation, data, parents, key)
            sentence = f"{where}.{reason}" if where and starts_with_key else f"{where}: {reason}".removeprefix(": ")
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
            sentence = f"{where} must be one of {', '.join(choices)}. Got {got!r}.{nearest(str(got), choices)}"
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            names = ", ".join(name for section in sections_in(annotation) for name in section.model_fields)
            sentence = f"{where} is a section with the keys {names or 'you choose'}. Got {got!r}."
        else:
            needed = str(item["msg"]).removeprefix("Input should be ").removeprefix("String should match ")
            sentence = f"{where} must be {needed}. Got {got!r}."
        by_place.setdefault(where, []).append(sentence)
    return [_join_alternatives(sentences) for sentences in by_place.values()]


def _join_alternatives(sentences: list[str]) -> str:
    """Several sentences about one key come from the members of a union: one sentence with "or"."""
    if len(sentences) == 1:
        return sentences[0]
    parts = [re.match(r"^(\S+ must be )(.*?)(\. Got .*)$", sentence) for sentence in sentences]
    matched = [part for part in parts if part is not None]
    if len(matched) < len(parts):
        return sentences[0]
    needed = " or ".join(dict.fromkeys(part.group(2) for part in matched))
    return matched[0].group(1) + needed + matched[0].group(3)


def _place(schema: type[Config], data: Value, loc: Sequence[int | str]) -> tuple[Location, str, object]:
    """Parents, key and the annotation that applies there, with pydantic's union tags left out.

    For an unknown key the annotation is that of the section it was put into.
    """
    path: list[str] = []
    annotation: object = schema
    for part in loc:
        section = section_of(annotation, data)
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
        elif isinstance(data, dict) and (item_type := mapping_value(annotation)) is not None and part in data:
            annotation = item_type
        elif isinstance(part, int):
            path[-1] = f"{path[-1]}[{part}]"
            continue
        elif section is not None and isinstance(data, dict) and part in data and part not in tags_of(section):
            return tuple(path), str(part), annotation
        else:
            continue  # the tag of a union's member
        path.append(str(part))
        data = data.get(str(part)) if isinstance(data, dict) else None
    return tuple(path[:-1]), path[-1] if path else "", annotation


def _field_names(annotation: object, data: Value, parents: Location, key: str) -> set[str]:
    for name in (*parents, key):
        data = data.get(name) if isinstance(data, dict) and name else data
    section = section_of(annotation, data)
    return set(section.model_fields) if section else set()


def _suggest(schema: type[Config], sections: Sequence[type[Config]], parents: Location, key: str) -> str:
    known = [name for section in sections for name in section.model_fields]
    prefix = "".join(f"{parent}." for parent in parents)
    suggestion = nearest(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
    if nearest(key, known):
        return suggestion
    elsewhere = [path for path, _ in walk(schema, {}) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" Known here: {', '.join(known)}"


def help_page(schema: type[Config], argv: Sequence[str], command: str, recipes: Path | None) -> str:
    tree, _ = read_arguments(schema, argv, recipes)
    usage = f"usage: {command}{' recipe=NAME' if recipes else ''} [key=value ...] [--print] [--debug]"
    lines = [usage, "", (schema.__doc__ or "").strip(), ""]
    if recipes:
        names = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml")))
        lines += [f"recipes: {names}", ""]
    for path, field in walk(schema, tree):
        tags = [tag for section in sections_in(field.annotation) for tag in tags_of(section)]
        if tags:
            lines.append(f"  {path}.name: one of {', '.join(tags)}; its keys: --help with recipe= or {path}.name=")
            continue
        needed = " (required)" if field.is_required() else f" (default: {_plain(field.get_default(call_default_factory=True))})"
        about = " ".join((field.description or "").split())
        lines.append(f"  {path}{needed}")
        lines += [f"      {about}"] if about else []
    return "\n".join(lines)


def _plain(value: object) -> str:
    plain = value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Config) else value
    plain = list(plain) if isinstance(plain, tuple) else str(plain) if isinstance(plain, Path) else plain
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()

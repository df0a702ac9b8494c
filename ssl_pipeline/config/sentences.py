"""The sentence that a user reads about a mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from ssl_pipeline.config.base import Config, Location, Value, nearest
from ssl_pipeline.config.hints import hint, like_key
from ssl_pipeline.config.schema import fixed_length, mapping_value, section_of, sections_in, tags_of, walk

BOUNDS = (  # pydantic's words and those of ranges
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("greater than", "above"),
    ("less than", "below"),
)
UNKNOWN_KEY = "Unknown key"
TOO_DEEP = "The settings are nested too deeply."


def mistakes(schema: type[Config], data: Value, error: ValidationError) -> list[str]:
    """One sentence per mistake: where, what is needed, what came, what to try."""
    by_place: dict[str, list[str]] = {}
    found: dict[str, tuple[_Place, object]] = {}
    for item in error.errors():
        place = _place(schema, data, item["loc"])
        found.setdefault(place.where, (place, item["input"]))
        sentence = f"{UNKNOWN_KEY} '{place.where}'.{_suggest(schema, data, place)}"
        if item["type"] != "extra_forbidden":
            sentence = _sentence(place, item["type"], item["input"], str(item["msg"]), item.get("ctx", {}))
        by_place.setdefault(place.where, []).append(sentence)
    # a list whose items are wrong is also reported as too short
    items = {place.partition("[")[0] for place in by_place if "[" in place}
    told = {where: _join_alternatives(sentences) for where, sentences in by_place.items() if where not in items}
    return [told[where] + hint(where, found[where][0].annotation, found[where][1], told[where]) for where in told]


class _Place(NamedTuple):
    """Where a mistake is, without pydantic's union tags, the annotation that applies there and the section it chose.

    For an unknown key both are those of the section it was put into.
    """

    parents: Location
    key: str
    annotation: object
    section: type[Config] | None

    @property
    def where(self) -> str:
        return ".".join((*self.parents, self.key) if self.key else self.parents)


def _sentence(place: _Place, kind: str, got: object, message: str, context: Mapping[str, object]) -> str:
    where, annotation = place.where, place.annotation
    sections, length = sections_in(annotation), fixed_length(annotation)
    tags = [tag for section in sections for tag in tags_of(section)] if len(sections) > 1 else []
    if kind in ("missing", "too_long") and length and isinstance(got, list):
        return f"{where} must have {length} values. Got {len(got)}."
    if kind == "missing":
        inside = ".KEY" if sections else ".NAME.KEY" if mapping_value(annotation) is not None else ""
        return f"{where} is missing: set {where}{inside}=..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = str(got.get("name", "")) if isinstance(got, dict) else str(got)
        return f"{where}.name must be one of {', '.join(tags)}. Got '{name}'.{nearest(name, tags)}"
    if tags and not isinstance(got, dict):
        return f"{where} is a section: set {where}.name to one of {', '.join(tags)}. Got {got!r}."
    if kind == "value_error":
        reason = str(context["error"])
        if reason.startswith("must "):
            return f"{where} {reason}"
        if where and reason.startswith((f"{where}.", f"{where} ")):
            return reason
        starts_with_key = place.section is not None and re.split(r"[ .]", reason)[0] in place.section.model_fields
        return f"{where}.{reason}" if where and starts_with_key else f"{where}: {reason}".removeprefix(": ")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"{where} must be one of {', '.join(choices)}. Got {got!r}.{nearest(str(got), choices)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        names = ", ".join(name for section in sections for name in section.model_fields)
        return f"{where} is a section with the keys {names or 'you choose'}. Got {got!r}."
    if kind == "json_invalid":
        return TOO_DEEP
    if isinstance(got, dict) and got and not sections:
        inner = next((name for name in got if name != "value"), "value")  # `value` is what was there before
        return f"{UNKNOWN_KEY} '{where}.{inner}'. {where} takes a value; it is not a section."
    needed = message.removeprefix("Input should be ").removeprefix("String should match ")
    for theirs, ours in BOUNDS:
        needed = needed.replace(theirs, ours)
    return f"{where} must be {needed}. Got {got!r}."


def _join_alternatives(sentences: list[str]) -> str:
    """Several sentences about one key come from the members of a union: one sentence with "or"."""
    sentences = [sentence for sentence in sentences if "must be a valid array" not in sentence] or sentences[:1]
    if len(sentences) == 1:
        return sentences[0]
    parts = [re.match(r"^(\S+ must be )(.*?)(\. Got .*)$", sentence) for sentence in sentences]
    matched = [part for part in parts if part is not None]
    if len(matched) < len(parts):
        return sentences[0]
    needed = " or ".join(dict.fromkeys(part.group(2) for part in matched))
    return matched[0].group(1) + needed + matched[0].group(3)


def _place(schema: type[Config], data: Value, loc: Sequence[int | str]) -> _Place:
    path: list[str] = []
    annotation: object = schema
    tag_follows = False
    for part in loc:
        section = section_of(annotation, data)
        inside, item_type = isinstance(data, dict) and part in data, mapping_value(annotation)
        if tag_follows:
            tag_follows = False
            continue
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
        elif inside and item_type is not None:
            annotation = item_type
        elif isinstance(part, int):
            if isinstance(data, list) and part < len(data):  # otherwise an item is missing: a mistake of the list
                path[-1] = f"{path[-1]}[{part}]"
            continue
        elif inside and section is not None:
            return _Place(tuple(path), str(part), annotation, section)
        else:
            continue  # the type of a union's member
        tag_follows = len(sections_in(annotation)) > 1
        path.append(str(part))
        data = data.get(str(part)) if isinstance(data, dict) else None
    return _Place(tuple(path[:-1]), path[-1] if path else "", annotation, section_of(annotation, data))


def _suggest(schema: type[Config], data: Value, place: _Place) -> str:
    known = list(place.section.model_fields) if place.section is not None else []
    prefix = "".join(f"{parent}." for parent in place.parents)
    if like := like_key(prefix, place.key, known):
        return like
    elsewhere = [path for path, _ in walk(schema, data) if path.rpartition(".")[2] == place.key]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" Known here: {', '.join(known)}"

"""Walking a schema together with the values given for it: which section applies where, and which defaults it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ssl_pipeline.config.base import Config, Location, Tree, Value
from ssl_pipeline.config.descriptions import described_fields


def alternatives(annotation: object) -> list[object]:
    """The members of a (nested) union, without None."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in alternatives(member)]
    return [] if annotation is type(None) else [annotation]


def sections_in(annotation: object) -> list[type[Config]]:
    return [part for part in alternatives(annotation) if isinstance(part, type) and issubclass(part, Config)]


def section_of(annotation: object, data: Value) -> type[Config] | None:
    """The section that a value is read with; of several (a union by `name`) the one that the value names."""
    candidates = sections_in(annotation)
    if len(candidates) > 1:
        name = data.get("name") if isinstance(data, dict) else None
        candidates = [candidate for candidate in candidates if name in tags_of(candidate)]
    return candidates[0] if candidates else None


def tags_of(section: type[Config]) -> tuple[str, ...]:
    """The values of `name` that select a member of a union."""
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def mapping_value(annotation: object) -> object | None:
    """The value type of a `dict[str, X]` annotation."""
    for part in alternatives(annotation):
        if get_origin(part) is dict:
            return get_args(part)[1]
    return None


def fixed_length(annotation: object) -> int | None:
    """The number of values of a `tuple[X, Y]` annotation; None for any other."""
    for part in alternatives(annotation):
        if get_origin(part) is tuple and Ellipsis not in get_args(part):
            return len(get_args(part))
    return None


def annotation_at(schema: type[Config], data: Value, location: Location) -> object | None:
    """The type of a key, or None for an unknown one; in a union that of the member that `data` names."""
    annotation: object | None = schema
    for name in location:
        section = section_of(annotation, data)
        field = section.model_fields.get(name) if section is not None else None
        annotation = field.annotation if field is not None else mapping_value(annotation)
        data = data.get(name) if isinstance(data, dict) else None
    return annotation


def complete(annotation: object, data: Value, default: object = None) -> Value:
    """Expand shorthands, and give every mentioned section the defaults of its unmentioned keys."""
    section = section_of(annotation, data)
    if section is None:
        item_type = mapping_value(annotation)
        if not isinstance(data, dict) or item_type is None:
            return data
        given = {name: item for name, item in data.items() if item is not None}  # null leaves an entry out
        return {name: complete(item_type, item) for name, item in given.items()}
    if section.shorthand and data is not None and not isinstance(data, dict):
        data = {section.shorthand: data}
    if not isinstance(data, dict):
        return data
    completed: Tree = default.model_dump(mode="json") if isinstance(default, section) else {}
    for name, item in data.items():
        field = section.model_fields.get(name)
        inherited = getattr(default, name, None) if isinstance(default, section) else field and field.get_default()
        completed[name] = complete(field.annotation, item, inherited) if field else item
    return completed


def state_in_full(annotation: object, data: Value) -> Value:
    """Give what a recipe says of a schedule (a section with a shorthand) all keys, by the defaults of its class.

    So a schedule in a recipe is what is written there, whatever schedule a method has by default.
    """
    section = section_of(annotation, data)
    if section is None:
        item_type = mapping_value(annotation)
        if not isinstance(data, dict) or item_type is None:
            return data
        return {name: state_in_full(item_type, item) for name, item in data.items()}
    if section.shorthand and data is not None:
        given = data if isinstance(data, dict) else {section.shorthand: data}
        return section.model_construct().model_dump(mode="json") | given
    if not isinstance(data, dict):
        return data
    fields = section.model_fields
    return {
        name: state_in_full(fields[name].annotation, item) if name in fields else item for name, item in data.items()
    }


def walk(schema: type[Config], data: Value, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of the schema with its field and text; in a union only the member that `data` names."""
    for name, field in described_fields(schema).items():
        value = data.get(name) if isinstance(data, dict) else None
        section = section_of(field.annotation, value)
        if section is not None and not section.shorthand:
            yield from walk(section, value, f"{prefix}{name}.")
            continue
        item_type = mapping_value(field.annotation)
        if item_type is not None and (item := section_of(item_type, None)) is not None:
            yield from walk(item, None, f"{prefix}{name}.NAME.")
            continue
        yield f"{prefix}{name}", field


def is_free_mapping(annotation: object) -> bool:
    """Whether the keys of a setting are chosen freely and its values are plain (the arguments of a timm model)."""
    item = mapping_value(annotation)
    return item is not None and not sections_in(item)

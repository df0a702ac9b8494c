"""What a settings class is, and which of its sections, defaults and keys the values given for it mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Tree = dict[str, "Value"]
Value = None | bool | int | float | str | list["Value"] | Tree


class ConfigError(ValueError):
    """A mistake in a setting or an input that the user can mend; commands print it as one line and exit with code 2."""


class RunError(RuntimeError):
    """A run that cannot go on; commands print it as one line and exit with code 1."""


class Config(BaseModel):
    """Read-only settings of one component; the string under each field is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    shorthand: ClassVar[str | None] = None
    """The field that a bare value given for the whole section sets (`value` of a schedule)."""
    positional: ClassVar[str | None] = None
    """The field that a bare argument of a command sets."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


class Kinds(NamedTuple):
    """What an annotation allows beside None: all members of its unions, and what some of them mean for a walk."""

    all: tuple[object, ...]
    sections: tuple[type[Config], ...]
    item: object | None  # the value type of a dict[str, X]
    length: int | None  # the number of values of a tuple[X, Y]

    @property
    def tags(self) -> tuple[str, ...]:
        """The values of `name` that select a section."""
        return tuple(tag for section in self.sections for tag in _tags_of(section))


def kinds_of(annotation: object) -> Kinds:
    kinds = tuple(_members(annotation))
    sections = tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config))
    items = (get_args(kind)[1] for kind in kinds if get_origin(kind) is dict)
    tuples = (get_args(kind) for kind in kinds if get_origin(kind) is tuple)
    return Kinds(kinds, sections, next(items, None), next((len(of) for of in tuples if Ellipsis not in of), None))


def _members(annotation: object) -> Iterator[object]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, UnionType):
        for member in inner[:1] if origin is Annotated else inner:
            yield from _members(member)
    elif annotation not in (None, type(None)):
        yield annotation


def _tags_of(section: type[Config]) -> tuple[str, ...]:
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def section_of(annotation: object, data: Value) -> type[Config] | None:
    """The section that a value is read with; of several (a union by `name`) the one that the value names."""
    sections = kinds_of(annotation).sections
    if len(sections) > 1:
        name = value_at(data, "name")
        sections = tuple(section for section in sections if name in _tags_of(section))
    return sections[0] if sections else None


def value_at(data: Value, key: object) -> Value:
    """What a section holds under a key, None if nothing."""
    return data.get(str(key)) if isinstance(data, dict) else None


def annotation_of(annotation: object, data: Value, key: str) -> object | None:
    """The type of a key, or None for an unknown one; in a union that of the member that `data` names."""
    section = section_of(annotation, data)
    field = section.model_fields.get(key) if section is not None else None
    return field.annotation if field is not None else kinds_of(annotation).item


def complete(annotation: object, data: Value, default: object = None) -> Value:
    """Expand shorthands, and give every mentioned section the defaults of its unmentioned keys."""
    section = section_of(annotation, data)
    if section is not None and section.shorthand and data is not None and not isinstance(data, dict):
        data = {section.shorthand: data}
    if not isinstance(data, dict):
        return data
    if section is None:
        item = kinds_of(annotation).item  # of a free section, where null leaves an entry out
        return data if item is None else {key: complete(item, data[key]) for key in data if data[key] is not None}
    completed: Tree = default.model_dump(mode="json") if isinstance(default, section) else {}
    for name, item in data.items():
        field = section.model_fields.get(name)
        inherited = getattr(default, name, None) if isinstance(default, section) else field and field.get_default()
        completed[name] = complete(field.annotation, item, inherited) if field else item
    return completed


def walk(schema: type[Config], data: Value, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of the schema with its field; in a union only the member that `data` names."""
    for name, field in schema.model_fields.items():
        value = value_at(data, name)
        section = section_of(field.annotation, value)
        entry = section_of(kinds_of(field.annotation).item, None)
        if section is not None and not section.shorthand:
            yield from walk(section, value, f"{prefix}{name}.")
        elif entry is not None:
            yield from walk(entry, None, f"{prefix}{name}.NAME.")
        else:
            yield f"{prefix}{name}", field

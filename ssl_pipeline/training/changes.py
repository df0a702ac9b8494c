"""How two settings of one command differ, and which differences a resumed run may have.

Each field says so where it is declared: `workers: MayChange[int] = 2`. A field that says nothing may not change; a
section's mark holds for all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass

from pydantic import JsonValue, TypeAdapter
from pydantic_core import to_jsonable_python

from ssl_pipeline.config import ChangeMark, Config

ABSENT = None  # null leaves an entry out
LONGEST_VALUE = 40


@dataclass(frozen=True)
class Change:
    """A key with the values that two settings have; `allowed`: whether a run may change it when it goes on."""

    key: str
    before: JsonValue
    now: JsonValue
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {short(self.before)} -> {short(self.now)}"

    @property
    def kept(self) -> str:
        """How a key is told where the run keeps its old value, whatever is given now."""
        return f"{self.key}={short(self.before)} (given now: {short(self.now)})"


def short(value: JsonValue) -> str:
    """A value as it is written on the command line, but of a long one only the beginning."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def changes(before: Config, now: Config) -> list[Change]:
    """Every key that differs, in the order of the schema."""
    return list(_between(before, now, "", allowed=False))


def _between(before: object, now: object, key: str, *, allowed: bool) -> Iterator[Change]:
    if isinstance(before, Config) and isinstance(now, Config):
        names = list(dict.fromkeys([*type(before).model_fields, *type(now).model_fields]))
        if type(before) is not type(now) and "name" in names:
            names = ["name"]  # the other keys mean something else then
        for name in names:
            field = type(now).model_fields.get(name) or type(before).model_fields[name]
            marked = allowed or any(isinstance(mark, ChangeMark) for mark in field.metadata)
            old, new = (getattr(config, name, ABSENT) for config in (before, now))
            yield from _between(old, new, _below(key, name), allowed=marked)
    elif isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            old, new = (entries.get(name, ABSENT) for entries in (before, now))
            yield from _between(old, new, _below(key, name), allowed=allowed)
    else:
        old, new = (_written(value) for value in (before, now))
        if old != new:
            yield Change(key, old, new, allowed)


def _written(value: object) -> JsonValue:
    """A value as settings are written: types of our own, such as Duration, say how."""
    written: JsonValue = (
        TypeAdapter(type(value)).dump_python(value, mode="json") if is_dataclass(value) else to_jsonable_python(value)
    )
    return written


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name

"""Ranges of numbers: every number in a setting has one, which the help shows and reading enforces.

A plain number takes pydantic's bounds, `momentum: float = Field(0.9, ge=0, lt=1)`. What holds several numbers takes
`InRange`: tuples, one value or one per view, and schedules, of which every value at any time is meant:
`teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)]`. Where no upper end is declared it is `LARGEST_WHOLE`, or
`LARGEST` for numbers with a fraction.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, get_args, get_origin, runtime_checkable

from pydantic import Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

LARGEST_WHOLE, LARGEST = 2**31 - 1, 1e12
BOUNDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@runtime_checkable
class HasNumbers(Protocol):
    """A value that consists of several numbers, such as a schedule."""

    def numbers(self) -> Mapping[str, float]:
        """The extreme numbers that it can stand for, by the key that sets each."""
        ...


@dataclass(frozen=True)
class InRange:
    """Bounds of each number in a value: `ge` and `le` belong to the range, `gt` and `lt` do not.

    increasing: whether the numbers of a tuple must not fall.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    increasing: bool = False

    def __str__(self) -> str:
        each = self._bounds_in_words()
        return f"an increasing pair{each and f', each {each}'}" if self.increasing else each

    def _bounds_in_words(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"between {plain(self.ge)} and {plain(self.le)}"
        bounds = ((words, getattr(self, bound)) for bound, words in WORDS.items())
        return " and ".join(f"{words} {plain(number)}" for words, number in bounds if number is not None)

    @property
    def has_top(self) -> bool:
        """Whether the range has an upper end of its own."""
        return self.le is not None or self.lt is not None

    def holds(self, number: float) -> bool:
        """Whether the number lies in the range."""
        limits = ((compare, getattr(self, bound)) for bound, compare in BOUNDS.items())
        return all(compare(number, limit) for compare, limit in limits if limit is not None)

    def check(self, value: Any) -> Any:
        """The value; raises ValueError for a number of it outside the range."""
        if isinstance(value, HasNumbers):
            for key, number in value.numbers().items():
                here = self if abs(number) <= LARGEST or self.has_top else replace(self, le=LARGEST)
                if not here.holds(number):
                    raise ValueError(f"{key} must be {here}. Got {plain(number)}.")
            return value
        numbers = list(numbers_in(value))
        falls = self.increasing and sorted(numbers) != numbers
        outside = [number for number in numbers if not self.holds(number)]
        if falls or (outside and self.increasing):
            raise ValueError(f"must be {self}. Got [{', '.join(map(plain, numbers))}].")
        if outside:
            raise ValueError(f"must be {self}. Got {plain(outside[0])}.")
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Channels of a layer."""
Depth = Annotated[int, Field(ge=1, le=1000)]
"""Layers, blocks or attention heads."""
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Processes = Annotated[int, Field(ge=0, le=1024)]


def plain(number: float) -> str:
    """A number as a user writes it: no exponent for what has few digits, no fraction for whole ones."""
    return str(int(number)) if number == int(number) and abs(number) < 1e16 else repr(number)


def numbers_in(value: object) -> Iterator[float]:
    """The numbers in plain data; booleans do not count."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, dict):
        yield from numbers_in(list(value.values()))


def ranges_of(field: FieldInfo) -> list[InRange]:
    """The ranges that a field declares: its own, and those of the items and alternatives of its type."""
    return _ranges(field.annotation, field.metadata)


def _ranges(annotation: object, metadata: Sequence[object]) -> list[InRange]:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _ranges(inner, [*more, *metadata])
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    given = {bound: getattr(part, bound, None) for part in flat for bound in BOUNDS if hasattr(part, bound)}
    bounds = {bound: limit for bound, limit in given.items() if limit is not None}
    increasing = any(getattr(part, "increasing", False) for part in flat)
    own = [InRange(**bounds, increasing=increasing)] if bounds or increasing else []
    return own + [found for part in get_args(annotation) for found in _ranges(part, ())]

"""What every settings class is, and the one kind of error that a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator, model_validator

from ssl_pipeline.config.ranges import LARGEST, LARGEST_WHOLE, HasNumbers, numbers_in, plain, ranges_of

Tree = dict[str, "Value"]
Value = None | bool | int | float | str | list["Value"] | Tree
Location = tuple[str, ...]
NAMES_SHOWN = 8  # of a long list in an error


@dataclass(frozen=True)
class ChangeMark:
    """The mark of a field that a resumed run may change."""


T = TypeVar("T")
MayChange = Annotated[T, ChangeMark()]
"""It goes around the whole type: `MayChange[int | None]`, not `MayChange[int] | None`."""


class ConfigError(ValueError):
    """A mistake in a setting or an input that the user can fix; commands print it as one line and exit with code 2."""


class SettingsError(ConfigError):
    """Several sentences, one to a line: no external name can add a line."""

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


class RunError(RuntimeError):
    """A run that cannot go on; commands print it as one line and exit with code 1."""


class Config(BaseModel):
    """Read-only settings of one component; the string under each field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None
    """The field that a bare value given for the whole section sets (`value` of a schedule)."""
    positional: ClassVar[str | None] = None
    """The field that a bare argument of a command sets."""
    one_of: ClassVar[tuple[str, ...]] = ()
    """Keys that say the same in different ways: one of them on the command line replaces those of the recipe."""

    @model_validator(mode="after")
    def _numbers_have_an_end(self) -> Self:
        ranged = set(self.numbers()) if isinstance(self, HasNumbers) else set[str]()  # by the range of what they are in
        for name in (one for one in _without_top(type(self)) if one not in ranged):
            for number in numbers_in(getattr(self, name)):
                largest = LARGEST_WHOLE if isinstance(number, int) else LARGEST
                if abs(number) > largest:
                    needed = "at most " if number > 0 else "at least -"
                    raise ValueError(f"{name} must be {needed}{plain(largest)}. Got {plain(number)}.")
        return self

    @classmethod
    def of_name(cls, name: str) -> tuple[str, ...]:
        """The keys of a recipe that go when the command line changes the `name` of this section to another."""
        return ()

    @classmethod
    def fit_recipe(cls, tree: Tree, given: Collection[str], recipe: Tree) -> list[str]:
        """Change those settings of a recipe that the keys `given` on the command line make useless; returns the
        sentences that say so.

        tree: the recipe with what is given over it; recipe: as it is without.
        """
        return []

    @field_validator("*")
    @classmethod
    def _paths_begin_at_home(cls, value: object) -> object:
        return Path(at_home(str(value))) if isinstance(value, Path) else value

    @field_validator("*")
    @classmethod
    def _none_is_null(cls, value: object) -> object:
        if str(value) == "None" and isinstance(value, str | Path):
            raise ValueError("must not be the word None.")
        return value


@cache
def _without_top(section: type[Config]) -> tuple[str, ...]:
    """The fields whose numbers have no upper end of their own."""
    fields = section.model_fields.items()
    return tuple(name for name, field in fields if not any(found.has_top for found in ranges_of(field)))


def at_home(place: str) -> str:
    """A path with the home directory for a leading `~`, which a shell does not expand in key=~/x."""
    if not place.startswith("~"):
        return place
    try:
        return str(Path(place).expanduser())
    except RuntimeError:
        raise ConfigError(f"There is no home directory for the ~ in '{place}'. Write the whole path.") from None


def is_there(place: str) -> bool:
    """Whether there is a file or directory of this name; what is too long for a path does not exist."""
    try:
        return Path(at_home(place)).exists()
    except OSError:
        return False


PlaceText = Annotated[str, AfterValidator(at_home)]
"""A path in a setting that may also hold another word, such as `digits`; settings of type Path need no more."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def some_of(known: Sequence[str], name: str, *, all_by: str = "") -> str:
    """The known names, of many those like `name`, with their number and what lists all of them."""
    if len(known) <= NAMES_SHOWN:
        return ", ".join(known) or "none"
    likeness = {one: difflib.SequenceMatcher(None, name, one).ratio() + (bool(name) and name in one) for one in known}
    first = sorted(known, key=lambda one: -likeness[one])[:NAMES_SHOWN]
    return f"{', '.join(first)}, ... ({len(known)} in all{all_by and f'; {all_by} lists them'})"


def sentences_of(error: BaseException) -> tuple[str, ...]:
    """What an error says: one line each."""
    return error.sentences if isinstance(error, SettingsError) else (str(error),)

"""A mistyped key, reported before torch is imported.

The schema is next to the classes that read it, and those import torch, which takes seconds. The names of its keys are
read here from the sources, as text. What this finds is certain, and worded as the schema words it; what a section that
is put together at import holds, the schema checks later. Values: `early_values`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config import Tree
from ssl_pipeline.config.hints import like_key
from ssl_pipeline.config.recipes import PACKAGE
from ssl_pipeline.config.sentences import UNKNOWN_KEY

CLASS = re.compile(r"^class (\w+)\(([\w, ]*)\):\n((?:[ ]{4}.*\n|[ ]*\n)*)", re.MULTILINE)
FIELD = re.compile(r"^    ([a-z]\w*): ((?!ClassVar).*)$", re.MULTILINE)
DOCSTRING = re.compile(r'""".*?"""', re.DOTALL)
TAG = re.compile(r'Literal\["(\w+)"\]')
SHORTHAND = 'shorthand: ClassVar[str | None] = "'
VIEW, VIEW_OPERATIONS = "ViewSettings", "_operation_settings"  # what is put together at import from those of operations
PRETRAIN, BASE, METHOD = "PretrainConfig", "Config", "MethodConfig"


@dataclass(frozen=True)
class Section:
    """A class of settings as its source shows it: the classes that it is made from, its keys with their types, and
    whether a bare value may set it (`shorthand`).
    """

    bases: tuple[str, ...]
    keys: Mapping[str, str]
    shorthand: bool


def sections_in_sources(package: Path = PACKAGE) -> dict[str, Section]:
    """All classes of the package by name; other classes are harmless."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        for name, bases, body in CLASS.findall(path.read_text(encoding="utf-8")):
            keys, made_from = dict(FIELD.findall(DOCSTRING.sub("", body))), tuple(filter(None, bases.split(", ")))
            found[name] = Section(made_from, keys, SHORTHAND in body)
    operations = [name for name, section in found.items() if VIEW in section.bases]
    return found | {VIEW_OPERATIONS: Section(tuple(operations), {}, shorthand=False)}


def unknown_keys(
    keys: Iterable[str], recipe: Tree, sections: Mapping[str, Section], *, own: Sequence[str] = ()
) -> list[str]:
    """A sentence for each key of `pretrain.py` that no section can have.

    recipe: it says which method's keys count. own: further keys of a command over it (`finetune.py`).
    """
    method = recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    others = [key for key in keys if key not in own]
    return [told for key in others if (told := _unknown(key.split("."), name, sections, own))]


def _unknown(parts: list[str], method: object, sections: Mapping[str, Section], own: Sequence[str]) -> str | None:
    section, named_freely = PRETRAIN, False
    for depth, part in enumerate(parts):
        if named_freely:
            named_freely = False
            continue
        known = keys_of(section, sections)
        if known is None:
            return None
        if part not in known:
            known = dict.fromkeys(own, "") | known if depth == 0 else known
            return _sentence(parts[: depth + 1], known, method, sections)
        kind = known[part]
        inside = section_of(kind, method, sections)
        if inside is None:
            return None
        section, named_freely = inside, is_by_name(kind)
    return None


def keys_of(name: str, sections: Mapping[str, Section]) -> dict[str, str] | None:
    """All keys of a section with their types; None unless all that it is made from is in the sources."""
    if name == BASE:
        return {}
    if name not in sections:
        return None
    found: dict[str, str] = {}
    for base in sections[name].bases:
        more = keys_of(base, sections)
        if more is None:
            return None
        found |= more
    return found | dict(sections[name].keys)


def section_of(kind: str, method: object, sections: Mapping[str, Section]) -> str | None:
    """The section that a type is, None if it is a value, or one of several."""
    words = set(re.findall(r"\w+", kind.partition(" = ")[0]))
    if METHOD in words:
        words = {methods_in(sections).get(str(method), "")}
    named = [word for word in words if word in sections and BASE in _line_of(word, sections)]
    return named[0] if len(named) == 1 else None


def is_by_name(kind: str) -> bool:
    """Whether a type is a mapping of names that are chosen freely."""
    return "dict[" in kind


def takes_bare_value(name: str, sections: Mapping[str, Section]) -> bool:
    """Whether a value that is not a section may be given for a section."""
    return any(sections[one].shorthand for one in _line_of(name, sections) if one in sections)


def methods_in(sections: Mapping[str, Section]) -> dict[str, str]:
    """The sections of methods by the names of these, sorted."""
    found = {match[1]: name for name, one in sections.items() if (match := TAG.fullmatch(one.keys.get("name", "")))}
    return dict(sorted(found.items()))


def _line_of(name: str, sections: Mapping[str, Section]) -> set[str]:
    """A class with all that it is made from."""
    bases = sections[name].bases if name in sections else ()
    return {name, *(above for base in bases for above in _line_of(base, sections))}


def _sentence(parts: list[str], known: Mapping[str, str], method: object, sections: Mapping[str, Section]) -> str:
    *above, key = parts
    start = "".join(f"{part}." for part in above)
    told = f"{UNKNOWN_KEY} '{'.'.join(parts)}'."
    if like := like_key(start, key, list(known)):
        return told + like
    for name, kind in (keys_of(PRETRAIN, sections) or {}).items():
        inside = section_of(kind, method, sections)
        if inside is not None and not is_by_name(kind) and key in (keys_of(inside, sections) or {}):
            return f"{told} Did you mean '{name}.{key}'?"
    return f"{told} Known here: {', '.join(known)}"

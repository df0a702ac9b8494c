"""A wrong value, reported before torch is imported.

The type and the range of a key are in the source of its section (`key_names`). Where all that they name can be had
without torch, they are evaluated from there, and the given keys make a small schema, which reads the values and words
the mistakes as the whole one does. What is left out here, and what must fit together, the whole schema checks later.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, create_model

import ssl_pipeline.config
from ssl_pipeline.commands.key_names import (
    METHOD,
    PRETRAIN,
    Section,
    is_by_name,
    keys_of,
    methods_in,
    section_of,
    takes_bare_value,
)
from ssl_pipeline.config import Config, ConfigError, Tree, read_yaml, sentences_of, validate
from ssl_pipeline.config.arguments import put_over
from ssl_pipeline.config.recipes import PACKAGE
from ssl_pipeline.config.schema import annotation_at, sections_in
from ssl_pipeline.schedule import Duration, Milestones, Schedule

ALIAS = re.compile(r"^([A-Z]\w*) = (.+)$", re.MULTILINE)
KNOWN: Mapping[str, object] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict, Path, Duration, Schedule)},
    **{name: getattr(ssl_pipeline.config, name) for name in ssl_pipeline.config.__all__},
    **{"Annotated": Annotated, "Literal": Literal, "Field": Field, "Milestones": Milestones},
}


OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitOr: operator.or_,
    ast.Pow: operator.pow,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Sub: operator.sub,
}


class Part(Config, extra="ignore"):
    """Some keys of a section."""


class Names(dict[str, object]):
    """What a type in a source can name: `KNOWN`, and what a module of the package defines in one line."""

    def __init__(self, package: Path = PACKAGE) -> None:
        super().__init__(KNOWN)
        self.texts: dict[str, set[str]] = {}
        for path in package.rglob("*.py"):
            for name, text in ALIAS.findall(path.read_text(encoding="utf-8")):
                self.texts.setdefault(name, set()).add(text)

    def __missing__(self, name: str) -> object:
        texts = self.texts.get(name, set())
        if len(texts) != 1:
            raise NameError(name)
        self[name] = found = self.value_of(*texts)
        return found

    def value_of(self, text: str) -> Any:
        return self._of(ast.parse(text, mode="eval").body)

    def _of(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self[node.id]
            case ast.Tuple():
                return tuple(map(self._of, node.elts))
            case ast.Subscript():
                return self._of(node.value)[self._of(node.slice)]
            case ast.UnaryOp(op=ast.USub()):
                return -self._of(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](self._of(node.left), self._of(node.right))
            case ast.Call():
                named = {str(keyword.arg): self._of(keyword.value) for keyword in node.keywords}
                return self._of(node.func)(*map(self._of, node.args), **named)
        raise NameError(ast.unparse(node))

    def field(self, declared: str) -> Any | None:
        """Type and default of a key, as pydantic takes them; None if they name something that needs torch."""
        kind, _, default = declared.partition(" = ")
        try:
            return self.value_of(kind), self.value_of(default) if default else None
        except (NameError, SyntaxError):
            return None


def wrong_values(
    pairs: Sequence[tuple[str, str]], recipe: Tree, sections: Mapping[str, Section], *, own: Collection[str] = ()
) -> list[str]:
    """A sentence for each value of `pretrain.py` that its key cannot take, whatever else is set.

    recipe: what the keys are put over; its method says which method's keys count. own: keys that are not read here.
    """
    method = recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    schema = _schema(PRETRAIN, [key.split(".") for key, _ in pairs if key not in own], name, sections, Names())
    read: list[tuple[str, str]] = []
    mistakes: list[str] = []
    for key, text in pairs:
        location = tuple(key.split("."))
        chooses = location[-1] == "name" and sections_in(annotation_at(schema, recipe, location[:-1]))
        if chooses or annotation_at(schema, recipe, location) is not None:
            read.append((key, text))
        elif key not in own:
            mistakes += _not_yaml(key, text)
    try:
        validate(schema, put_over(schema, deepcopy(recipe), read))
    except ConfigError as error:
        mistakes += [told for told in sentences_of(error) if told.startswith(tuple(key for key, _ in read))]
    return mistakes


def _not_yaml(key: str, text: str) -> list[str]:
    """The sentence for a value that is not YAML, of a key whose type is unknown here: keys that take any text have
    one."""
    try:
        read_yaml(text, where=f"{key}={text}")
    except ConfigError as error:
        return [str(error)]
    return []


def _schema(
    section: str, keys: Sequence[Sequence[str]], method: object, sections: Mapping[str, Section], names: Names
) -> type[Config]:
    """A section with those of these keys whose types are there; each may be absent."""
    known = keys_of(section, sections) or {}
    fields: dict[str, Any] = {}
    for part in dict.fromkeys(key[0] for key in keys):
        declared = known.get(part, "")
        below = [key[1:] for key in keys if key[0] == part and len(key) > 1]
        if (field := names.field(declared)) is not None:
            fields[part] = field
        elif is_by_name(declared):
            inside = section_of(declared, method, sections)
            if inside is not None and below:
                fields[part] = (_by_name(inside, below, sections, names), None)
        elif declared.startswith(METHOD) and (not below or method not in methods_in(sections)):
            fields[part] = (_method_by_name(sections), None)
        elif (inside := section_of(declared, method, sections)) is not None and (
            below or not takes_bare_value(inside, sections)
        ):
            whole = _schema(inside, below, method, sections, names) if below else _any_of(inside, sections)
            fields[part] = (whole | None if "| None" in declared else whole, None)
    return create_model(section, __base__=Part, **fields)


def _by_name(
    section: str, keys: Sequence[Sequence[str]], sections: Mapping[str, Section], names: Names
) -> type[Config]:
    """Sections under names that are chosen freely, the first part of each key."""
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(key[0] for key in keys):
        inside = [key[1:] for key in keys if key[0] == name and len(key) > 1]
        entry = _schema(section, inside, None, sections, names) if inside else _any_of(section, sections)
        fields[name] = (entry | None, None)
    return create_model(section, __base__=Part, **fields)


def _any_of(section: str, sections: Mapping[str, Section]) -> type[Config]:
    """A section that takes all values of its keys: for what is not a section."""
    keys: dict[str, Any] = {key: (Any, None) for key in keys_of(section, sections) or {}}
    return create_model(section, __base__=Part, **keys)


def _method_by_name(sections: Mapping[str, Section]) -> Any:
    """The type of the section `method` as far as its name goes."""
    names: dict[str, Any] = {name: (Literal[name], ...) for name in methods_in(sections)}
    kinds = [create_model(name, __base__=Part, name=field) for name, field in names.items()]
    return Annotated[Union[tuple(kinds)], Field(discriminator="name")]  # noqa: UP007

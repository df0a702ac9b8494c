"""A wrong value, told before torch is there.

The type and the range of a key stand in the source of its section (`key_names`). Where all that they name can be had
without torch, they are evaluated from there, and the given keys make a small schema, which reads the values and words
the mistakes as the whole one does. What is left out here, and what must fit together, the whole schema tells later.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

import ssl_pipeline.config
from ssl_pipeline.commands.key_names import PRETRAIN, Section, keys_of, section_of
from ssl_pipeline.config import Config, ConfigError, Tree, sentences_of, validate
from ssl_pipeline.config.arguments import put_over
from ssl_pipeline.config.recipes import PACKAGE
from ssl_pipeline.config.schema import annotation_at
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
    """What a type in a source can name: `KNOWN`, and what a module of the package calls so in one line of its own."""

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
        """Type and default of a key, as pydantic takes them; None if they name what is not there without torch."""
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
    read = [(key, text) for key, text in pairs if annotation_at(schema, {}, tuple(key.split("."))) is not None]
    try:
        validate(schema, put_over(schema, deepcopy(recipe), read))
    except ConfigError as error:
        return [told for told in sentences_of(error) if told.startswith(tuple(key for key, _ in read))]
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
        elif below and "dict[" not in declared and (inside := section_of(declared, method, sections)) is not None:
            fields[part] = (_schema(inside, below, method, sections, names), None)
    return create_model(section, __base__=Part, **fields)

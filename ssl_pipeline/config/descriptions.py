"""The text under each field of a section, read when somebody asks for it.

pydantic could do it as each class is defined (`use_attribute_docstrings`), but all commands would wait for it.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from inspect import cleandoc, getsource
from itertools import pairwise

from pydantic.fields import FieldInfo

from ssl_pipeline.config.base import Config

Texts = dict[str, str]  # by the name of a field


@cache
def described_fields(section: type[Config]) -> dict[str, FieldInfo]:
    """`section.model_fields` with the strings under the fields as `description`."""
    fields = section.model_fields
    for owner in reversed(section.__mro__):
        if issubclass(owner, Config):
            texts = _texts_in(owner.__module__).get(owner.__qualname__, {})
            for name in fields.keys() & texts.keys():  # other names are of the class alone
                fields[name].description = texts[name]
    return fields


@cache
def _texts_in(module: str) -> dict[str, Texts]:
    """What stands under the annotated names of every class of a module, by the class's qualified name.

    Nothing where the source is missing, as where a program was packed without it.
    """
    found: dict[str, Texts] = {}
    try:
        source = getsource(sys.modules[module])
    except (KeyError, TypeError, OSError):
        return found
    _collect(ast.parse(source).body, "", found)
    return found


def _collect(body: list[ast.stmt], prefix: str, found: dict[str, Texts]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[f"{prefix}{node.name}"] = _texts_of(node.body)
            _collect(node.body, f"{prefix}{node.name}.", found)
        elif isinstance(node, ast.FunctionDef):
            _collect(node.body, f"{prefix}{node.name}.<locals>.", found)


def _texts_of(body: list[ast.stmt]) -> Texts:
    texts: Texts = {}
    for field, below in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        if isinstance(text, str):
            texts[field.target.id] = cleandoc(text)
    return texts

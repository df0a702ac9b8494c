"""The text under each field of a section, read when somebody asks for it.

pydantic could do it as each class is defined (`use_attribute_docstrings`), but all commands would wait for it.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path

from pydantic.fields import FieldInfo

from ssl_pipeline.config.base import Config

Texts = dict[str, str]  # by the name of a field


@cache
def described_fields(section: type[Config]) -> dict[str, FieldInfo]:
    """`section.model_fields` with the strings under the fields as `description`."""
    fields = section.model_fields
    for owner in reversed(section.__mro__):
        file = getattr(sys.modules.get(owner.__module__), "__file__", None)
        if issubclass(owner, Config) and file is not None:
            texts = _texts_in(Path(file)).get(owner.__qualname__, {})
            for name in fields.keys() & texts.keys():  # other names are of the class alone
                fields[name].description = texts[name]
    return fields


@cache
def _texts_in(file: Path) -> dict[str, Texts]:
    """What stands under the annotated names of every class of a module, by the class's qualified name."""
    found: dict[str, Texts] = {}
    _collect(ast.parse(file.read_text(encoding="utf-8")).body, "", found)
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
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = cleandoc(str(below.value.value))
    return texts

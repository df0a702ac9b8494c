"""The text under a field, read from the source of its class."""

import importlib
import py_compile
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic.fields import FieldInfo

from ssl_pipeline.config import Config
from ssl_pipeline.config.descriptions import described_fields
from ssl_pipeline.config.help import help_page
from ssl_pipeline.config.schema import walk


class Base(Config):
    """Settings."""

    width: int = 1
    """Pixels of one side,
    in a second line too."""
    silent: int = 2
    places: ClassVar[int] = 3
    """Of the class alone."""


class Derived(Base):
    width: int = 4
    own: int = 5
    """What a derived class adds."""


class Other(Base):
    width: int = 6
    """Another text for the same field."""


def texts(fields: dict[str, FieldInfo]) -> dict[str, str | None]:
    return {name: field.description for name, field in fields.items()}


def test_a_field_has_the_text_under_it_and_those_of_its_base_classes():
    inherited = "Pixels of one side,\nin a second line too."
    assert texts(described_fields(Base)) == {"width": inherited, "silent": None}
    assert texts(described_fields(Derived)) == {
        "width": inherited, "silent": None, "own": "What a derived class adds."
    }  # fmt: skip
    assert texts(described_fields(Other))["width"] == "Another text for the same field."
    assert texts(described_fields(Base))["width"] == inherited, "a derived class has fields of its own"


def test_a_class_in_a_function_or_a_class_has_its_texts_too():
    class Inner(Config):
        depth: int = 1
        """Of this function."""

        class Innermost(Config):
            depth: int = 1
            """Of the class in it."""

    assert texts(described_fields(Inner)) == {"depth": "Of this function."}
    assert texts(described_fields(Inner.Innermost)) == {"depth": "Of the class in it."}
    assert texts(dict(walk(Inner, None))) == {"depth": "Of this function."}


def test_the_help_page_has_them():
    page = help_page(Derived, [], [], "command", None)
    assert "own (whole number; default: 5)\n      What a derived class adds." in page


def test_only_a_string_is_a_text():
    class Short(Config):
        left: int = 1
        ...
        right: int = 2
        b"bytes"  # noqa: B018

    assert texts(described_fields(Short)) == {"left": None, "right": None}


@pytest.mark.parametrize("module", ["nowhere", "builtins"])
def test_a_class_without_a_source_has_none(module: str):
    made = type("Made", (Config,), {"__annotations__": {"width": int}, "width": 1, "__module__": module})
    assert texts(described_fields(made)) == {"width": None}


def test_the_texts_of_a_zip_are_found_and_help_needs_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "from ssl_pipeline.config import Config\nclass Packed(Config):\n    width: int = 1\n    'Of a zip.'\n"
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("from_a_zip.py", source)
    (tmp_path / "compiled.py").write_text(source)
    py_compile.compile(str(tmp_path / "compiled.py"), cfile=str(tmp_path / "compiled.pyc"))
    (tmp_path / "compiled.py").unlink()
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in (("from_a_zip", "Of a zip."), ("compiled", None)):
        section = importlib.import_module(module).Packed
        assert texts(described_fields(section)) == {"width": text}
        assert "width (whole number; default: 1)" in help_page(section, [], [], "command", None)

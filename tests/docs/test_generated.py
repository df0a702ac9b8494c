"""Tables that are made from the code are current, and README stays short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = runpy.run_path(str(ROOT / "docs" / "generated.py"), run_name="generated")
MOST_LINES = 130


@pytest.mark.parametrize("name", GENERATED["TABLES"])
def test_tables_are_current(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert GENERATED["renewed"](text, GENERATED["TABLES"][name], where=name) == text, "python docs/generated.py"


def test_a_block_without_marks_is_noticed():
    with pytest.raises(ValueError, match=r"X\.md must have <!-- a --> and <!-- /a -->"):
        GENERATED["renewed"]("text", {"a": str}, where="X.md")


def test_every_method_and_recipe_has_its_row():
    methods, recipes = GENERATED["methods"](), GENERATED["recipes_by_folder"]()
    assert all(f"\n| `{name}` | " in methods for name in GENERATED["_recipes_of_methods"]())
    assert all(f"\n| `{head.name}` | " in recipes for head in GENERATED["recipe_headers"]())
    assert "- | views" not in methods.replace("cross-entropy", "")  # each names what it minimises


def test_readme_is_read_in_one_sitting():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES

"""Tables that are made from the code are current, and README stays short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import FrameType

import pytest

from tests.tiny import CLASSES, make_batch, make_method, needs, progress_at, takes_cnn

ROOT = Path(__file__).parents[2]
GENERATED = runpy.run_path(str(ROOT / "docs" / "generated.py"), run_name="generated")
LOSSES = ROOT / "ssl_pipeline" / "losses"
MOST_LINES = 110


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
    assert "|  |" not in methods  # each names what it minimises and what it needs


def rows_of_methods() -> dict[str, list[str]]:
    """The cells of docs/methods.md by the name of the method."""
    lines = (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in cells if len(row) == 5 and row[0] != "`method.name`"}


def test_rows_have_the_views_of_the_classes():
    rows = rows_of_methods()
    assert rows.keys() == CLASSES.keys()
    for name, (*_, told, _) in rows.items():
        for views in needs(name):
            times, labels = f" x {views.count}" if views.count else "", " (with labels)" * views.labelled
            assert f"`{views.name}`{times}{labels}" in told, name
        assert ("patch tokens" in told) != takes_cnn(name), name


def called_losses(name: str) -> set[str]:
    """The functions of ssl_pipeline.losses that a step of a tiny method calls, but for those that call each other."""
    method, batch, found = make_method(name), make_batch(name), set()

    def note_call(frame: FrameType, event: str, _: object) -> None:
        file, caller = Path(frame.f_code.co_filename), frame.f_back
        while caller is not None and caller.f_code.co_filename.endswith(("precision.py", "_contextlib.py")):
            caller = caller.f_back
        if (
            event == "call"
            and file.parent == LOSSES
            and file.stem not in ("precision", "checks")
            and caller is not None
        ):
            public = not frame.f_code.co_name.startswith(("_", "<"))
            from_outside = Path(caller.f_code.co_filename).parent != LOSSES
            found.update({frame.f_code.co_name} if public and from_outside else ())

    sys.setprofile(note_call)
    try:
        method(batch, progress_at(3))
    finally:
        sys.setprofile(None)
    return found


def test_rows_have_the_losses_that_a_step_calls():
    for name, (_, _, told, *_) in rows_of_methods().items():
        called = called_losses(name)
        assert called, name
        assert called <= set(re.findall(r"`(\w+)`", told)), name


def test_rows_have_no_loss_of_another_method():
    rows = rows_of_methods()
    assert [name for name, row in rows.items() if "`relative_threshold`" in row[2]] == ["adamatch"]
    assert {name for name, row in rows.items() if "`koleo_loss`" in row[2]} == {"dinov2", "dinov3"}
    assert {name for name, row in rows.items() if "`sinkhorn_targets`" in row[2]} == {"dinov2", "dinov3", "swav"}


def test_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    without_rows = {name: lambda: "" for name in GENERATED["TABLES"]["README.md"]}  # looked up, and not read
    assert len(GENERATED["renewed"](text, without_rows, where="README.md").splitlines()) <= MOST_LINES

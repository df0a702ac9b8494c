"""The notebooks run from their first cell to the last, in an empty directory, and what they claim holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
DATA = 1  # the cell that says where images and weights are
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, object]]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(name: str, *, own: dict[str, str] | None = None, num_cells: int | None = None) -> dict[str, object]:
    """The names that the code of a notebook leaves. own: what a reader sets in place of None. num_cells: the first
    ones alone."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)[:num_cells]):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for variable, value in (own or {}).items() if number == DATA else ():
                assert f"\n{variable} = None  # or your own" in code
                code = code.replace(f"\n{variable} = None", f"\n{variable} = {value!r}")
            exec(compile(code, f"{name}, cell {number}", "exec"), names)
    return names


def files_in(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def test_there_are_three():
    assert NAMES == ["add_a_method", "from_weights", "own_photographs"]


@pytest.mark.parametrize("name", NAMES)
def test_none_has_results_of_somebody_else(name):
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells(name))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("own_photographs", {"PHOTOS": "mine"}),
        ("from_weights", {"PHOTOS": "mine", "WEIGHTS": "mine/weights.safetensors"}),
        ("from_weights", {"PHOTOS": "mine", "WEIGHTS": "c3_in1k"}),
    ],
)
def test_nothing_is_drawn_into_what_is_the_readers_own(place, name, own):
    (place / "mine" / "stripes").mkdir(parents=True)
    (place / "mine" / "stripes" / "000.png").write_bytes(b"a photograph")
    (place / "mine" / "weights.safetensors").write_bytes(b"weights")
    before = files_in(place)
    names = run(name, own=own, num_cells=DATA + 1)
    assert files_in(place) == before
    assert names["photos"] == Path("mine")
    assert names.get("weights") == own.get("WEIGHTS")


@pytest.mark.slow
def test_own_photographs_are_only_read(place):
    run("own_photographs", num_cells=DATA + 1)
    (place / "drawn" / "photos").rename(place / "mine")
    before = files_in(place / "mine")
    run("own_photographs", own={"PHOTOS": "mine"})
    assert files_in(place / "mine") == before
    assert list((place / "drawn").iterdir()) == []


@pytest.mark.slow
def test_own_photographs_end_in_a_report(place):
    names = run("own_photographs")
    assert (place / "runs" / "drawn" / "report" / "index.html").read_text().startswith("<!")
    assert names["features"].shape == (48, names["run"].backbone.embed_dim)
    assert 0 <= names["accuracy"]["top1"] <= 100
    assert sorted(path.name for path in place.iterdir()) == ["drawn", "runs"]


@pytest.mark.slow
def test_weights_are_measured_before_and_after(place, capsys):
    names = run("from_weights")
    start, before, after = (
        network.state_dict() for network in (_begun(), names["before"].backbone.model, names["after"].backbone.model)
    )
    torch.testing.assert_close(before, start, rtol=0, atol=0)  # which a run without learning rate leaves as they were
    assert not torch.equal(after["conv1.0.weight"], start["conv1.0.weight"])
    assert "step 0: RankMe" in capsys.readouterr().out
    assert sorted(path.name for path in place.iterdir()) == ["drawn", "runs"]


def _begun() -> torch.nn.Module:
    import timm
    from safetensors.torch import load_file

    network = timm.create_model("resnet10t", num_classes=0)
    network.load_state_dict(load_file("drawn/weights.safetensors"))
    return network


def test_a_method_of_ones_own_learns(place):
    names = run("add_a_method")
    assert names["losses"][-1] < names["losses"][0]
    assert list(place.iterdir()) == []

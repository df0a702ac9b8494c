"""The notebooks run from their first cell to the last, in an empty directory, and what they claim holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, object]]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(name: str) -> dict[str, object]:
    """The names that the code of a notebook leaves."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    return names


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


@pytest.mark.slow
def test_own_photographs_end_in_a_report(place):
    names = run("own_photographs")
    assert (place / "runs" / "photos" / "report" / "index.html").read_text().startswith("<!")
    assert names["features"].shape == (48, names["run"].backbone.embed_dim)
    assert 0 <= names["accuracy"]["top1"] <= 100


@pytest.mark.slow
def test_weights_are_measured_before_and_after(place, capsys):
    names = run("from_weights")
    start, before, after = (
        network.state_dict() for network in (_begun(), names["before"].backbone.model, names["after"].backbone.model)
    )
    torch.testing.assert_close(before, start, rtol=0, atol=0)  # which a run without learning rate leaves as they were
    assert not torch.equal(after["conv1.0.weight"], start["conv1.0.weight"])
    assert "step 0: RankMe" in capsys.readouterr().out


def _begun() -> torch.nn.Module:
    import timm
    from safetensors.torch import load_file

    network = timm.create_model("resnet10t", num_classes=0)
    network.load_state_dict(load_file("weights.safetensors"))
    return network


def test_a_method_of_ones_own_learns(place):
    names = run("add_a_method")
    assert names["losses"][-1] < names["losses"][0]
    assert list(place.iterdir()) == []

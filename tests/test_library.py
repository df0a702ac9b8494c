"""docs/library.md: every block of code runs as it stands, with fewer and smaller images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_pipeline

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), flags=re.DOTALL)
SHORTER = {  # what a test cannot wait for, and what it has instead
    "range(100)": "range(1)",
    "batch_size=64": "batch_size=4",
    '"epochs": 20': '"epochs": 1, "hang_timeout": 0',
    '"data.batch_size": 32': '"data.batch_size": 8, "data.workers": 0, "augment.view.size": 32',
}


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A directory with photos/ of two classes, from which a program is called."""
    for number in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 120, (40, 48 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels + np.uint8(120 * (number % 2))).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def run_block(text: str) -> dict[str, object]:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    names: dict[str, object] = {"__name__": "block"}
    torch.manual_seed(0)
    exec(compile(text, "library.md", "exec"), names)
    return names


def test_what_a_test_shortens_is_there():
    assert len(BLOCKS) == 3
    assert all(any(long in block for block in BLOCKS) for long in SHORTER)


def test_the_commands_as_functions(photos):
    names = run_block(BLOCKS[0])
    assert names["run"].path == Path("runs/photos")
    assert Path("runs/photos/report/index.html").read_text().startswith("<!")
    assert names["features"].shape == (24, names["run"].backbone.embed_dim)
    assert sorted(names["files"]) == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    assert 0 <= names["accuracy"]["top1"] <= 100
    assert isinstance(names["backbone"], type(names["run"].backbone))


@pytest.mark.parametrize("number", [1, 2])
def test_a_loop_of_ones_own_learns(photos, number):
    names = run_block(BLOCKS[number])
    assert np.isfinite(names["loss"].item())
    trained = names["backbone"].conv1.weight
    assert trained.grad.abs().sum() > 0
    assert names["views"].keys() == {"global", "local"} if number == 2 else True


def test_every_public_name_is_told_of():
    told = (ROOT / "docs" / "library.md").read_text()
    assert [name for name in ssl_pipeline.__all__ if name not in told and name != "Run"] == []

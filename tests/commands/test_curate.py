"""A part of many images: like a seed set, or balanced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.commands.curate import CurateConfig, curate
from ssl_pipeline.config import run_command
from ssl_pipeline.data.subset import open_subset
from ssl_pipeline.packing.make_shards import MakeShards, make_shards

COLOURS = {"red": (200, 40, 30), "green": (40, 190, 40), "blue": (30, 40, 210)}
COUNTS = {"red": 30, "green": 6, "blue": 6}


def pack(folder: Path, counts: dict[str, int], seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / "files" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, 12, (12, 12, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "files" / name / f"{number}.png")
    make_shards(MakeShards.model_validate({"source": str(folder / "files"), "output": folder / "shards", "workers": 1}))
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("pool"), COUNTS, seed=0)


def call(*arguments: str) -> int:
    model = ("backbone=raw_pixels", "size=4", "workers=0")
    return run_command(CurateConfig, curate, command="python -m data_tools.curate", argv=[*model, *arguments])


def classes(shards: Path, keep: Path) -> dict[str, int]:
    index = open_subset(str(shards), keep=keep)
    assert index.class_names is not None
    return {name: int((index.labels() == number).sum()) for number, name in enumerate(index.class_names)}


def counts_of(keep: Path) -> dict[str, object]:
    return json.loads(keep.with_suffix(".json").read_text())["origin"]["counts"]


def test_each_seed_brings_at_most_so_many_of_its_kind(shards, tmp_path, capsys):
    seeds = pack(tmp_path / "seeds", {"green": 3}, seed=1)
    output = tmp_path / "like.npy"
    assert call(f"shards={shards}", f"seeds={seeds}", "per_seed=2", f"output={output}") == 0
    found = classes(shards, output)
    assert (found["red"], found["blue"]) == (0, 0)
    assert 2 <= found["green"] <= 6
    counts = counts_of(output)
    assert counts["kept"] == found["green"]
    assert counts["brought_by_several_seeds"] == 3 * 2 - found["green"]
    assert "2 nearest to each of 3 seeds" in capsys.readouterr().out
    assert output.with_suffix(".html").read_text().count("data:image/jpeg") == 3 * (1 + 2)


def test_what_is_too_far_from_a_seed_is_not_brought(shards, tmp_path, capsys):
    seeds = pack(tmp_path / "seeds", {"green": 1}, seed=1)
    arguments = (f"shards={shards}", f"seeds={seeds}", f"output={tmp_path / 'like.npy'}")
    assert call(*arguments, "per_seed=42", "similarity=0.9") == 0
    assert classes(shards, tmp_path / "like.npy") == {"red": 0, "green": 6, "blue": 0}
    assert call(*arguments, "similarity=1", "overwrite=true") == 2
    assert "leaves no image: the nearest to a seed has 0.9" in capsys.readouterr().err


def test_clusters_give_equal_shares(shards, tmp_path, capsys):
    output = tmp_path / "balanced.npy"
    assert call(f"shards={shards}", "clusters=9,3", "images=18", "nearest=2", f"output={output}") == 0
    assert classes(shards, output) == {"red": 6, "green": 6, "blue": 6}
    assert counts_of(output)["most_of_a_top_cluster"] == 6
    assert "18 of 42 images stay, in equal shares of 3 clusters of 6 to 30 images: at most 6 of each." in (
        capsys.readouterr().out
    )
    assert "6 of 30 images stay" in output.with_suffix(".html").read_text()


def test_one_level_is_a_number(shards, tmp_path):
    output = tmp_path / "balanced.npy"
    assert call(f"shards={shards}", "clusters=3", "images=9", "rounds=0", f"output={output}", "shown=0") == 0
    assert classes(shards, output) == {"red": 3, "green": 3, "blue": 3}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "exactly one of seeds=SHARDS and clusters=1000,100 must be given"),
        (("clusters=3",), "needs the number of images to choose, images=N"),
        (("clusters=3,9", "images=5"), "clusters must decrease from level to level"),
        (("clusters=3", "images=50"), "images=50 is more than there are images: 42"),
        (("clusters=43", "images=5"), "clusters=43 is more than there are images: 42"),
        (("seeds=nowhere",), "nowhere"),
    ],
)
def test_mistakes_are_sentences(shards, tmp_path, capsys, arguments, sentence):
    assert call(f"shards={shards}", f"output={tmp_path / 'kept.npy'}", *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "kept.npy").exists()

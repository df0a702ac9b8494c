"""Near duplicates are left out, and nothing else: on parts of two photographs and copies of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_pipeline.commands.deduplicate import DeduplicateConfig, deduplicate
from ssl_pipeline.config import run_command
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.subset import open_subset
from ssl_pipeline.data_tools.curation.planted import ALTERATIONS
from ssl_pipeline.packing.make_shards import MakeShards, make_shards

SIDE, NUM = 96, 24
MODEL = ("backbone=test_resnet", "size=48", "workers=0")  # at random initialisation: the pixels decide


def parts() -> list[Image.Image]:
    """Squares of two photographs that do not overlap."""
    squares = []
    for photo in load_sample_images().images:
        for top in range(20, photo.shape[0] - SIDE, SIDE):
            squares += [photo[top : top + SIDE, left : left + SIDE] for left in range(0, photo.shape[1] - SIDE, SIDE)]
    lively = sorted(squares, key=lambda square: -float(square.std()))[:NUM]
    return [Image.fromarray(square) for square in lively]


def pack(folder: Path, images: dict[str, Image.Image]) -> Path:
    (folder / "files").mkdir(parents=True)
    for name, image in images.items():
        image.save(folder / "files" / name, quality=95)
    settings = {"source": str(folder / "files"), "output": folder / "shards", "workers": 1, "labels": "none"}
    make_shards(MakeShards.model_validate(settings))
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts 0 to 23; copies of 0 to 3, each altered in another way, and a copy of a copy of 0."""
    images = {f"part{number:02d}.png": part for number, part in enumerate(parts())}
    for number, (alter, suffix) in enumerate(zip(ALTERATIONS.values(), ("png", "jpg", "png", "jpg"), strict=True)):
        images[f"copy{number}.{suffix}"] = alter(images[f"part{number:02d}.png"], number)
    images["again.jpg"] = images["copy0.png"].resize((70, 70))
    return pack(tmp_path_factory.mktemp("photos"), images)


def call(*arguments: str) -> int:
    command = "python -m data_tools.deduplicate"
    return run_command(DeduplicateConfig, deduplicate, command=command, argv=[*MODEL, *arguments])


def files(index) -> list[str]:
    return sorted(index.origin(sample) for sample in range(len(index)))


def test_one_of_each_group_stays_the_largest(shards, tmp_path, capsys):
    output = tmp_path / "kept.npy"
    assert call(f"shards={shards}", f"output={output}", "threshold=0.8") == 0
    assert files(open_subset(str(shards), keep=output)) == [f"part{number:02d}.png" for number in range(NUM)]
    counts = json.loads(output.with_suffix(".json").read_text())["origin"]["counts"]
    assert (counts["images"], counts["kept"], counts["duplicates"]) == (NUM + 5, NUM, 5)
    assert (counts["groups"], counts["largest_group"]) == (4, 3)
    printed = capsys.readouterr().out
    assert "24 of 29 images stay: 5 are near duplicates of them (in 4 groups)." in printed
    sheet = output.with_suffix(".html").read_text()
    assert sheet.count("<figcaption>stays: ") == 4
    assert sheet.count("data:image/jpeg") == 9
    assert "again.jpg" in sheet


def test_features_are_computed_once_and_an_output_is_not_replaced(shards, tmp_path, capsys, monkeypatch):
    output = tmp_path / "kept.npy"
    assert call(f"shards={shards}", f"output={output}", "threshold=0.8", "shown=0") == 0
    assert not output.with_suffix(".html").exists()
    assert call(f"shards={shards}", f"output={output}", "threshold=0.9") == 2
    assert "exists. Choose another name, or set overwrite=true." in capsys.readouterr().err
    monkeypatch.setattr("ssl_pipeline.eval.features.passes.compute_rows", None)
    assert call(f"shards={shards}", f"output={output}", "threshold=0.9", "overwrite=true", "shown=0") == 0


def test_images_of_a_test_set_go_with_their_whole_group(shards, tmp_path, capsys):
    first = parts()[0]
    test = pack(tmp_path / "test", {"seen.jpg": first.resize((80, 80)), "other.png": first.rotate(90)})
    output = tmp_path / "kept.npy"
    assert call(f"shards={shards}", f"output={output}", "threshold=0.8", f"against={test}") == 0
    kept = files(open_subset(str(shards), keep=output))
    assert kept == [f"part{number:02d}.png" for number in range(1, NUM)]
    counts = json.loads(output.with_suffix(".json").read_text())["origin"]["counts"]
    assert counts["in_the_test_set"] == 3
    assert counts["duplicates"] == 3
    assert "test: seen.jpg" in output.with_suffix(".html").read_text()


def test_of_an_earlier_choice_a_smaller_one_is_made(shards, tmp_path):
    first, second = tmp_path / "first.npy", tmp_path / "second.npy"
    assert call(f"shards={shards}", f"output={first}", "threshold=0.8", "shown=0") == 0
    assert call(f"shards={shards}", f"keep={first}", f"output={second}", "threshold=0.8", "shown=0") == 0
    np.testing.assert_array_equal(np.load(first), np.load(second))
    assert len(open_shards(str(shards))) == NUM + 5


def test_planted_copies_are_counted(shards, tmp_path, capsys):
    output = tmp_path / "kept.npy"
    assert call(f"shards={shards}", f"output={output}", "threshold=0.8", "planted=12", "shown=0") == 0
    planted = json.loads(output.with_suffix(".json").read_text())["origin"]["counts"]["planted"]
    assert planted["images"] == 12
    assert planted["recall_by_kind"].keys() == ALTERATIONS.keys()
    assert planted["recall"] >= 80
    assert planted["precision"] == 100
    assert "planted copies of 12 images: found" in capsys.readouterr().out


def test_alike_features_alone_are_no_duplicates(shards, tmp_path):
    """A network at random initialisation finds everything alike: without the pixels nothing would be left."""
    output = tmp_path / "kept.npy"
    assert call(f"shards={shards}", f"output={output}", "threshold=0.3", "pixels=0", "shown=0") == 0
    assert len(np.load(output)) < NUM // 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("threshold=0.8", "output=kept.txt"), "output must end in .npy. Got 'kept.txt'."),
        (("threshold=1.5", "output=kept.npy"), "threshold"),
        (("output=kept.npy",), "threshold"),
    ],
)
def test_mistakes_are_sentences(shards, capsys, arguments, sentence):
    assert call(f"shards={shards}", *arguments) == 2
    assert sentence in capsys.readouterr().err

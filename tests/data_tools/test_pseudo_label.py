"""What data_tools.pseudo_label writes is what the run's classifier says, and what a student can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import save_classifier
from ssl_pipeline.config import run_command, validate
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.labelled import open_labelled_images
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.data.subset import open_subset, write_keep
from ssl_pipeline.data_tools.pseudo_label import (
    PseudoLabelImages,
    _below,
    choose,
    keep_file,
    labels_of,
    main,
    pseudo_label,
)
from ssl_pipeline.eval.features.classes import class_probabilities, open_classifier
from tests.eval.conftest import NUM_CLASSES, run, train

__all__ = ["run", "train"]

PROBABILITIES = np.array(
    [[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]], dtype=np.float32
)


@pytest.fixture
def teacher(run: Path) -> Path:
    """A run that classifies."""
    generator = torch.Generator().manual_seed(3)
    classifier = nn.Linear(24, NUM_CLASSES)
    nn.init.normal_(classifier.weight, generator=generator)
    save_classifier(run, classifier, None)
    return run


def settings(teacher: Path, shards: str, output: Path, **own: object) -> PseudoLabelImages:
    return PseudoLabelImages(run=teacher, shards=shards, output=output, workers=0, device="cpu", **own)


def said_by(teacher: Path, shards: str) -> np.ndarray:
    config = settings(teacher, shards, Path("unused.npy"))
    return torch.cat(
        list(class_probabilities(open_classifier(config), open_shards(shards), config, description="images"))
    ).numpy()


def test_sure_guesses_are_taken():
    assert choose(PROBABILITIES, threshold=0.5, per_class=None).tolist() == [0, 1, 2, 3]
    assert choose(PROBABILITIES, threshold=0.95, per_class=None).tolist() == []
    assert choose(PROBABILITIES, threshold=0.95, per_class="smallest").tolist() == []


def test_of_each_class_the_surest_are_taken():
    assert choose(PROBABILITIES, threshold=0.5, per_class=2).tolist() == [0, 2, 3]
    assert choose(PROBABILITIES, threshold=0.0, per_class="smallest").tolist() == [0, 2, 4]
    same = np.array([[0.7, 0.3]] * 4, dtype=np.float32)
    assert choose(same, threshold=0.0, per_class=2).tolist() == [0, 1]  # equally sure: in their order


def test_known_labels_stay_and_others_are_guessed_or_none():
    known, taken = np.array([2, -1, -1, -1]), np.array([1, 3])
    hard = labels_of(known, taken, PROBABILITIES[:2], soft=False)
    assert hard.dtype == np.int64
    assert hard.tolist() == [2, 0, -1, 0]
    soft = labels_of(known, taken, PROBABILITIES[:2], soft=True)
    assert soft.dtype == np.float32
    np.testing.assert_array_equal(soft, [[0, 0, 1], PROBABILITIES[0], [0, 0, 0], PROBABILITIES[1]])


@pytest.mark.parametrize("soft", [True, False])
def test_a_student_reads_what_the_teacher_says(soft: bool, teacher: Path, train: str, tmp_path: Path) -> None:
    probabilities = said_by(teacher, train)
    threshold = float(np.quantile(probabilities.max(axis=1), 0.5))
    output = tmp_path / "round-1" / "labels.npy"
    counts = pseudo_label(settings(teacher, train, output, threshold=threshold, soft=soft))
    labelled = {"shards": train, "keep": str(keep_file(output)), "labels": str(output)}
    data = validate(DataConfig, {"shards": train, "batch_size": 8, "labelled": labelled})
    index = open_labelled_images(data)
    assert index is not None
    taken = np.flatnonzero(probabilities.max(axis=1) >= threshold)
    assert index.in_whole_set().tolist() == taken.tolist()
    if soft:
        np.testing.assert_allclose(index.labels(), probabilities[taken], rtol=1e-6)
    else:
        assert index.labels().tolist() == probabilities[taken].argmax(axis=1).tolist()
    assert counts.taken.sum() == len(taken)
    assert counts.guessed.sum() == 72
    own = open_shards(train).labels()[taken]
    assert counts.right == pytest.approx(100 * (probabilities[taken].argmax(axis=1) == own).mean())
    origin = json.loads(output.with_suffix(".json").read_text())["origin"]
    assert origin["taken"] == counts.taken.tolist()
    assert origin["teacher"]["weights_sha256"]


def test_images_whose_labels_are_known_keep_them(teacher: Path, train: str, tmp_path: Path) -> None:
    index = open_shards(train)
    known = tmp_path / "known.npy"
    write_keep(known, index, [3, 8, 40], origin=None)
    output = tmp_path / "labels.npy"
    with pytest.raises(DataError, match=r"^known=none\.npy: there is no such file"):
        pseudo_label(settings(teacher, train, output, threshold=1.0, soft=False, known=Path("none.npy")))
    counts = pseudo_label(settings(teacher, train, output, threshold=1.0, soft=False, known=known))
    labels = open_subset(train, labels=output).labels()
    assert [labels[number] for number in (3, 8, 40)] == [3, 2, 4]
    assert (np.delete(labels, [3, 8, 40]) == -1).all()
    assert counts.known.tolist() == [0, 0, 1, 1, 1, 0]
    assert np.load(keep_file(output), allow_pickle=False).tolist() == [3, 8, 40]


def test_of_a_subset_the_others_have_no_label(teacher: Path, train: str, tmp_path: Path) -> None:
    subset = tmp_path / "some.npy"
    write_keep(subset, open_shards(train), [5, 6, 7], origin=None)
    output = tmp_path / "labels.npy"
    pseudo_label(settings(teacher, train, output, threshold=0.0, keep=subset))
    assert np.load(keep_file(output), allow_pickle=False).tolist() == [5, 6, 7]
    np.testing.assert_allclose(open_subset(train, labels=output).labels()[5:8], said_by(teacher, train)[5:8], rtol=1e-5)


@pytest.mark.parametrize(
    ("surest", "threshold", "told"),
    [(0.45234, 0.9, "0.452"), (0.99999994, 1.0, "0.9999999"), (0.94999, 0.95, "0.94999")],
)
def test_the_surest_is_never_said_to_reach_what_it_does_not(surest: float, threshold: float, told: str) -> None:
    assert _below(np.float32(surest), threshold) == told


def test_nothing_is_written_where_no_image_is_sure(teacher: Path, train: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No image of .* reaches threshold=1: the most confident has 0\.\d+"):
        pseudo_label(settings(teacher, train, tmp_path / "labels.npy", threshold=1.0))
    assert list(tmp_path.glob("labels*")) == []


def test_files_that_are_there_are_kept(
    teacher: Path, train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "labels.npy"
    output.write_bytes(b"mine")
    argv = [f"run={teacher}", f"shards={train}", f"output={output}", "workers=0", "threshold=0"]
    assert run_command(PseudoLabelImages, main, command="x", argv=argv) == 2
    assert "exists. Choose another name, or set overwrite=true" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    assert run_command(PseudoLabelImages, main, command="x", argv=[*argv, "overwrite=true"]) == 0
    assert "72 of 72 images have a label" in capsys.readouterr().out

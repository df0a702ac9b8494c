"""Segmentation: what patches should say, what heads say, how it is counted, and what cannot be measured."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.augment.central_crop import stretched
from ssl_pipeline.config import run_command
from ssl_pipeline.eval.dense import main
from ssl_pipeline.eval.dense_images import open_dense
from ssl_pipeline.eval.dense_sets import DenseConfig
from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.eval.segmentation import (
    NOT_COUNTED,
    cross_entropy,
    neighbour_classes,
    overlap,
    overlap_scores,
    overlaps_of,
    patch_classes,
    segment,
    train_heads,
)

FAST = ["workers=0", "learning_rates=[0.1]", "epochs=30", "k=3", "validation_fraction=0.3"]
CNN = ["backbone=test_resnet", "size=64"]
COLOURS = {0: (220, 30, 30), 3: (30, 220, 30), 11: (30, 30, 220)}

MakeSource = Callable[..., Path]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def files(names: list[str], *, seed: int = 0) -> dict[str, bytes]:
    """Images of 24 x 32 pixels, the left part of class 0 and the right one of class 3, an edge between them void."""
    generator, found = np.random.default_rng(seed), {}
    for name in names:
        mask = np.zeros((24, 32), dtype=np.uint8)
        edge = int(generator.integers(8, 24))
        mask[:, edge:] = 3
        mask[:, edge] = 11
        colours = np.array([COLOURS.get(number, (0, 0, 0)) for number in range(12)])[mask]
        noisy = np.clip(colours + generator.normal(0, 20, colours.shape), 0, 255).astype(np.uint8)
        found |= {f"images/{name}.png": png(noisy), f"masks/{name}.png": png(mask)}
    return found


@pytest.fixture
def source(tmp_path: Path) -> MakeSource:
    def make(change: dict[str, bytes | None] | None = None, *, zipped: bool = False) -> Path:
        train, test = [f"a{number}" for number in range(8)], [f"b{number}" for number in range(3)]
        content: dict[str, bytes | None] = {
            **files([*train, *test]),
            "train.txt": "\n".join(f"images/{name}.png" for name in train).encode(),
            "test.txt": "\n".join(test).encode(),
            "classes.txt": b"left\nb\nc\nright\n",
            **(change or {}),
        }
        there = {name: data for name, data in content.items() if data is not None}
        if zipped:
            with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
                for name, data in there.items():
                    archive.writestr(name, data)
            return tmp_path / "source.zip"
        for name, data in there.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "source"

    return make


def call(*arguments: str) -> int:
    """Of a key that is given twice the later value."""
    argv = list({argument.partition("=")[0]: argument for argument in (*FAST, *arguments)}.values())
    return run_command(DenseConfig, main, command="python -m eval.dense", argv=argv)


def test_a_patch_has_the_shares_of_its_pixels() -> None:
    mask = np.array([[0, 0, 1, 1], [0, 2, 1, NOT_COUNTED]])
    shares = patch_classes(mask, (1, 2), 3)
    torch.testing.assert_close(shares, torch.tensor([[3 / 4, 0, 1 / 4], [0, 3 / 4, 0]]))
    torch.testing.assert_close(patch_classes(mask, (2, 4), 3).argmax(dim=1), torch.tensor([0, 0, 1, 1, 0, 2, 1, 0]))
    assert patch_classes(mask, (4, 8), 3).sum() == 7  # each pixel in the patch of its centre, the others are empty


def test_a_head_learns_what_linear_features_say_and_reaches_the_gradient_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator)
    shares = torch.softmax(features @ torch.randn(5, 3, generator=generator) * 3, dim=1)
    weights, biases = train_heads(features, shares, learning_rates=(0.5, 1e-6), epochs=100, batch_size=50, seed=0)
    found = [cross_entropy(features @ weights[s] + biases[s], shares) for s in (0, 1)]
    least = -(shares * shares.log()).sum(dim=1).mean().item()
    assert found[0] < least + 0.01
    assert found[1] == pytest.approx(np.log(3), abs=0.01)  # hardly left zero


def test_one_step_is_the_gradient_of_the_cross_entropy() -> None:
    features, shares = torch.randn(6, 4), torch.softmax(torch.randn(6, 3), dim=1) * 0.7
    weights, biases = train_heads(features, shares, learning_rates=(1.0,), epochs=1, batch_size=6, seed=0)
    weight, bias = torch.zeros(4, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss = -(shares * (features @ weight + bias).log_softmax(dim=1)).sum() / 6
    loss.backward()
    torch.testing.assert_close(weights[0], -weight.grad)
    torch.testing.assert_close(biases[0], -bias.grad)


def test_neighbours_give_their_classes_by_similarity() -> None:
    similarities = torch.tensor([[0.9, 0.5]])
    shares = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = neighbour_classes(similarities, shares, temperature=0.2)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.5]]).div(0.2).softmax(dim=1))


def test_scores_of_patches_become_pixels() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # left and right patch
    assert segment(scores, (1, 2), (3, 6)).tolist() == [[0, 0, 0, 1, 1, 1]] * 3


def test_overlap_is_intersection_over_union() -> None:
    true = np.array([[0, 0, 1, NOT_COUNTED]])
    found = overlaps_of([overlap(np.array([[0, 1, 1, 1]]), true, 3)] * 4)
    ious = found.class_ious()
    assert ious[:2].tolist() == pytest.approx([50.0, 50.0])
    assert ious[2].isnan()
    scored = overlap_scores(found)
    assert scored["miou"] == (50.0, share_interval(50.0, 4))  # all images are the same
    assert scored["pixel_accuracy"][0] == pytest.approx(200 / 3)


def test_the_interval_is_over_images() -> None:
    true = np.array([[0, 1]])
    images = [overlap(true, true, 2)] * 3 + [overlap(1 - true, true, 2)] * 3
    value, (low, high) = overlap_scores(overlaps_of(images))["pixel_accuracy"]
    assert value == 50.0
    assert low < 25
    assert high > 75


def test_the_whole_image_is_stretched() -> None:
    image = torch.zeros(4, 8, 3, dtype=torch.uint8)
    image[:, 4:] = 200
    assert stretched(image, 2, "bilinear")[0].tolist()[0][0] < 60 < 140 < stretched(image, 2, "bilinear")[0][0][1]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_cnn_is_measured_and_reported(
    source: MakeSource, tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"source={source(zipped=zipped)}", "ignore=11", f"output={tmp_path}", "baselines=true"]
    assert call(*CNN, *arguments) == 0
    printed, said = capsys.readouterr()
    assert "has no patch tokens: the 2 x 2 places of its last map are taken, each for 32 pixels of 64" in said
    report = json.loads((tmp_path / "eval" / "dense.json").read_text())
    names = [measure["name"] for measure in report["measures"]]
    assert names == ["miou_linear", "pixel_accuracy_linear", "miou_knn", "pixel_accuracy_knn"]
    assert [row["class"] for row in report["linear"]["iou_by_class"]] == ["left", "right"]
    assert set(report["baselines"]) == {"random"}
    protocol = report["protocol"]
    assert (protocol["num_train"], protocol["num_test"], protocol["num_classes"]) == (8, 3, 2)
    assert (protocol["grid"], protocol["ignore"], protocol["fit"]) == ([2, 2], [11], "stretch")
    assert "mIoU, linear" in printed


def test_patch_tokens_tell_colours_apart(source: MakeSource, run: Path) -> None:
    assert call(f"run={run}", f"source={source()}", "ignore=11", "size=32", "k=5") == 0
    report = json.loads((run / "eval" / "dense.json").read_text())
    values = {measure["name"]: measure["value"] for measure in report["measures"]}
    assert values["miou_linear"] > 60
    assert values["miou_knn"] > 60


def test_splits_may_be_folders(source: MakeSource) -> None:
    folders = {f"{kind}/val/{name}.png": b"" for kind in ("images", "masks") for name in ("x", "y")}
    found = open_dense(str(source(folders)), "images", "masks", "val")
    assert found.pairs == (("images/val/x.png", "masks/val/x.png"), ("images/val/y.png", "masks/val/y.png"))


RGB = png(np.zeros((24, 32, 3), dtype=np.uint8))
SMALL = png(np.zeros((12, 32), dtype=np.uint8))
NO_MASKS: dict[str, bytes | None] = {f"masks/{name}{n}.png": None for name in "ab" for n in range(8)}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({**NO_MASKS, "masks/.keep": b""}, (), "has no masks: its folder 'masks' is empty"),
        ({"masks/a3.png": None}, (), "has no mask 'masks/a3'; 1 of 8 are missing"),
        ({"masks/b1.png": SMALL}, (), "'masks/b1.png' of SOURCE has 32x12 pixels, 'images/b1.png' has 32x24"),
        ({"masks/b1.png": RGB}, (), "one number per pixel, its class. 'masks/b1.png' of SOURCE has pixels of Pillow's"),
        ({"masks/b1.png": b"?"}, (), "'masks/b1.png' of SOURCE is not a PNG"),
        ({}, ("ignore=0,3,11",), "two classes or more in the masks of train=train.txt"),
        ({}, ("masks=labels",), "has no folder 'labels'"),
        ({}, ("train=val.txt",), "has no file 'val.txt'"),
        ({}, ("source=no/such",), "source=no/such must be a folder or a zip"),
        ({}, ("backbone=raw_pixels", "size=16"), "Raw pixels have neither"),
        ({}, ("k=1000",), "k=1000 must be at most the number of training patches"),
        ({}, ("validation_fraction=0.01",), "none is left on one side"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    change: dict[str, bytes | None],
    arguments: tuple[str, ...],
    message: str,
    source: MakeSource,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = source(change)
    assert call(*CNN, f"source={place}", *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message.replace("SOURCE", str(place)) in next(line for line in error if line.startswith("error: "))

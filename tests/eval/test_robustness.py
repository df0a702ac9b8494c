"""Corruptions by hand and against Pillow, and what an evaluation makes of them."""

from __future__ import annotations

import colorsys
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.config import run_command
from ssl_pipeline.eval.corruptions import (
    CIFAR10_C,
    CORRUPTIONS,
    IMAGENET_C,
    Corrupt,
    brightness,
    contrast,
    defocus_blur,
    disk,
    jpeg,
    strengths_for,
)
from ssl_pipeline.eval.robustness import RobustnessConfig, main, summarise

CPU = torch.device("cpu")


def call(*arguments: str) -> int:
    return run_command(RobustnessConfig, main, command="python -m eval.robustness", argv=["workers=0", *arguments])


def pixels(count: int = 3, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, side // 4, side // 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_is_the_images_own_and_grows_with_its_severity(corruption: str) -> None:
    clean, ids = pixels(), torch.tensor([7, 2, 9])
    distances = []
    for strength in CIFAR10_C[corruption]:
        change = Corrupt(corruption, strength)
        together, alone = change(clean, ids, CPU), change(clean[1:2], ids[1:2], CPU)
        assert together.dtype == torch.uint8
        assert torch.equal(together[1:2], alone)
        distances.append((together.float() - clean.float()).abs().mean().item())
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    gray = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = Corrupt("gaussian_noise", 0.08, seed=1)(gray, torch.tensor([5]), CPU).float() / 255
    assert noisy.std().item() == pytest.approx(0.08, rel=0.05)
    assert not torch.equal(noisy, Corrupt("gaussian_noise", 0.08, seed=2)(gray, torch.tensor([5]), CPU).float() / 255)


def test_a_disk_is_flat_inside_and_soft_at_its_edge() -> None:
    weights = disk(4, 0.5)
    assert weights.shape == (11, 11)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[5, 5].item() == pytest.approx(1 / 49, rel=1e-4)  # 49 pixels have their centres within 4
    assert 0 < weights[5, 0] < weights[5, 1] < weights[5, 5]
    torch.testing.assert_close(weights, weights.T)


@pytest.mark.parametrize("side", [24, 6])
def test_a_blur_keeps_what_is_flat_even_where_the_disk_is_larger_than_the_image(side: int) -> None:
    flat = torch.full((1, 3, side, side), 0.4)
    torch.testing.assert_close(defocus_blur(flat, radius=10, edge=0.5), flat)


def test_brightness_raises_the_value_of_hsv() -> None:
    colours = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = brightness(colours, 0.3)
    for row, column in np.ndindex(4, 4):
        hue, saturation, value = colorsys.rgb_to_hsv(*colours[0, :, row, column].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1.0))
        assert found[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)
    assert brightness(torch.zeros(1, 3, 1, 1), 0.2).flatten().tolist() == pytest.approx([0.2] * 3)


def test_contrast_moves_colours_to_their_mean() -> None:
    colours = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    torch.testing.assert_close(contrast(colours, 0.5)[0, 0, 0], torch.tensor([0.3, 0.5]))


def test_jpeg_is_pillows() -> None:
    clean, file = pixels(1), io.BytesIO()
    Image.fromarray(clean[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    assert np.array_equal(jpeg(clean, quality=40)[0].permute(1, 2, 0).numpy(), np.array(Image.open(file)))


def test_strengths_are_those_of_the_benchmark_of_the_size() -> None:
    assert strengths_for(32) == ("CIFAR-10-C", CIFAR10_C)
    assert strengths_for(224) == ("ImageNet-C", IMAGENET_C)


def test_means_are_over_severities_and_corruptions() -> None:
    hits = {
        "clean": torch.tensor([[1, 1, 1, 0]]).bool(),
        "contrast": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool(),
        "jpeg": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
    }
    found = summarise(hits)
    assert {measure.name: measure.value for measure in found.measures} == {
        "top1_mean_corrupted": 37.5,
        "top1_clean": 75.0,
        "top1_contrast": 25.0,
        "top1_jpeg": 50.0,
    }
    assert found.details["by_severity"] == {"contrast": [50.0, 0.0], "jpeg": [75.0, 25.0]}


def test_a_run_is_measured_and_reported(run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"run={run}", f"train={train}", f"test={test}", "k=5", "num_test=12"]
    assert call(*sets, "corruptions=contrast,gaussian_noise", "baselines=true") == 0
    assert "top-1 by severity" in capsys.readouterr().out
    report = json.loads((run / "eval" / "robustness.json").read_text())
    names = [measure["name"] for measure in report["measures"]]
    assert names == ["top1_mean_corrupted", "top1_clean", "top1_contrast", "top1_gaussian_noise"]
    raw = {measure["name"]: measure["value"] for measure in report["baselines"]["raw_pixels"]["measures"]}
    assert raw["top1_clean"] > 90.0  # the classes are colours
    assert len(report["by_severity"]["contrast"]) == 5
    assert (report["protocol"]["strengths"], report["protocol"]["measured"]) == ("CIFAR-10-C", 12)
    assert len(list((run / "eval" / "cache").iterdir())) == 3  # the clean training images of three models


@pytest.mark.parametrize(("argument", "message"), [("k=73", "Got k=73"), ("corruptions=fog", "corruptions")])
def test_a_mistake_is_told(
    argument: str, message: str, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("backbone=raw_pixels", f"train={train}", f"test={test}", argument) == 2
    assert message in capsys.readouterr().err

"""Measures without labels: of which pixels they are, and that figures are those of the functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_pipeline.augment.multi_crop import MultiCrop
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import run_command
from ssl_pipeline.eval.label_free import WITHOUT_CHANGE, LabelFreeConfig, RandomView, main, measure_label_free
from ssl_pipeline.eval.spectra import alignment, lidar, rankme, uniformity

CPU = torch.device("cpu")


def call(*arguments: str) -> int:
    return run_command(LabelFreeConfig, main, command="python -m eval.label_free", argv=["workers=0", *arguments])


def random_view(view: int, **settings: object) -> RandomView:
    mean, std = WITHOUT_CHANGE
    group = ViewGroup(count=1, size=16, **settings)
    return RandomView(MultiCrop({"view": group}, mean=mean, std=std), view)


def test_a_view_is_the_images_own_whatever_its_neighbours() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = random_view(1)(pixels, torch.tensor([3, 9, 4, 7]), CPU)
    alone = random_view(1)(pixels[2:3], torch.tensor([4]), CPU)
    torch.testing.assert_close(together[2:3], alone)
    assert not torch.allclose(together, random_view(0)(pixels, torch.tensor([3, 9, 4, 7]), CPU))
    assert 0 <= together.min() <= together.max() <= 255
    assert together.max() > 2


def test_a_view_without_change_is_the_image() -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nothing = random_view(0, scale=(1.0, 1.0), aspect=(1.0, 1.0), flip_prob=0.0, jitter_prob=0.0, gray_prob=0.0)
    torch.testing.assert_close(nothing(pixels, torch.arange(2), CPU), pixels.float(), rtol=0, atol=1e-3)


def test_figures_are_those_of_the_functions() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator)
    views = features[:, None] + 0.2 * torch.randn(30, 3, 8, generator=generator)
    found = {measure.name: measure for measure in measure_label_free(features, views).measures}
    assert found["rankme"].value == rankme(features)
    assert found["rankme_percent"].value == pytest.approx(100 * rankme(features) / 8)
    assert found["lidar"].value == lidar(views)
    assert found["uniformity"].value == pytest.approx((uniformity(views[:, 0]) + uniformity(views[:, 1])) / 2)
    pairs = torch.cat([alignment(views[:, first], views[:, second]) for first, second in ((0, 1), (0, 2), (1, 2))])
    assert found["alignment"].value == pytest.approx(pairs.mean().item())
    low, high = found["alignment"].interval or (0, 0)
    assert low < found["alignment"].value < high


def test_too_few_dimensions_for_alpha_leave_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    names = [measure.name for measure in measure_label_free(torch.randn(9, 3), torch.randn(9, 2, 3)).measures]
    assert "alpha" not in names
    assert "lidar" in names
    assert "alpha_req needs two eigenvalues" in capsys.readouterr().err


def test_images_without_labels_are_measured(run: Path, write_shards: Callable[..., Path], tmp_path: Path) -> None:
    unlabelled = write_shards(tmp_path / "unlabelled", [None] * 20)
    assert call(f"run={run}", f"images={unlabelled}", "num_images=10", "baselines=true") == 0
    report = json.loads((run / "eval" / "label_free.json").read_text())
    assert report["evaluator"] == "label_free"
    assert report["protocol"]["num_images"] == 10
    assert report["protocol"]["views"] == 2
    assert set(report["baselines"]) == {"raw_pixels", "random"}
    assert len(report["measures"]) == 7


def test_too_few_images_are_told(
    write_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_shards(tmp_path / "few", [None] * 5)
    assert call("backbone=raw_pixels", f"images={few}") == 2
    assert f"need 6 images or more. {few} has 5" in capsys.readouterr().err

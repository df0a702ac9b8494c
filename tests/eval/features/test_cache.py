"""Features on disk: computed once, damage found, nothing left of what was cut short."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features import passes
from ssl_pipeline.eval.features.cache import RowsFile
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import EvaluatedModel
from ssl_pipeline.eval.features.passes import PassConfig, feature_pass
from tests.ranks import run_on_ranks

PREPROCESSING = Preprocessing(16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


class MeanColour(nn.Module):
    """Its forward passes are counted; `factor` stands for its weights."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.images = factor, 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return images.mean(dim=(2, 3)) * self.factor


def features(
    folder: Path, shards: str, *, factor: float = 1.0, **settings: object
) -> tuple[np.ndarray, list[int], int]:
    """The features, the labels, and how many images were seen beside the empty one."""
    network = MeanColour(factor)
    model = EvaluatedModel("mean colour", network, PREPROCESSING, {"factor": factor}, None)
    config = PassConfig.model_validate({"backbone": "raw_pixels", "batch_size": 7, "workers": 0, **settings})
    found = feature_pass(folder, model, FeatureKinds(network), open_shards(shards), config, description="")
    return found.features["pooled"].numpy(), found.labels.tolist(), max(network.images - 1, 0)


def test_features_are_computed_once(test: str, tmp_path: Path) -> None:
    first, labels, seen = features(tmp_path / "cache", test)
    second, again, seen_again = features(tmp_path / "cache", test)
    assert (seen, seen_again) == (31, 0)
    np.testing.assert_array_equal(first, second)
    assert labels == again == [number % 6 for number in range(31)]


def test_features_are_mapped_and_any_program_reads_them(test: str, tmp_path: Path) -> None:
    values, _, _ = features(tmp_path, test)
    (path,) = tmp_path.rglob("pooled.npy")
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), values)
    assert str(path) in Path("/proc/self/maps").read_text()


def test_other_weights_settings_and_images_are_other_features(test: str, train: str, tmp_path: Path) -> None:
    calls: list[tuple[str, float, dict[str, object]]] = [
        (test, 1.0, {}),
        (test, 2.0, {}),
        (test, 1.0, {"dtype": "float16"}),
        (test, 1.0, {"precision": "bf16"}),
        (train, 1.0, {}),
    ]
    for shards, factor, settings in calls:
        assert features(tmp_path, shards, factor=factor, **settings)[2] > 0
    assert len(list(tmp_path.iterdir())) == len(calls)


def test_half_precision_takes_half_the_disk(test: str, tmp_path: Path) -> None:
    whole, half = (features(tmp_path / name, test, dtype=name)[0] for name in ("float32", "float16"))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    with pytest.raises(ConfigError, match=r"float16 holds numbers up to 65,504\. .* take dtype=float32"):
        features(tmp_path, test, factor=1e6, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float16", "float32"]


def cut(content: bytearray) -> bytes:
    return bytes(content[:-8])


def flipped(content: bytearray) -> bytes:
    content[-20] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b""])
@pytest.mark.parametrize("file", ["pooled.npy", "labels.npy", "pass.json"])
def test_damaged_features_are_computed_again(
    damage: Callable[[bytearray], bytes], file: str, test: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = features(tmp_path, test)[0].copy()  # it is a map of the file that is damaged now
    (path,) = tmp_path.rglob(file)
    if file == "pass.json" and damage is flipped:
        path.write_text("[]")
    else:
        path.write_bytes(damage(bytearray(path.read_bytes())))
    values, _, seen = features(tmp_path, test)
    assert seen == 31
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(values, expected)
    assert features(tmp_path, test)[2] == 0


def test_features_of_another_network_or_of_other_images_are_computed_again(
    test: str, train: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = features(tmp_path / "asked", test)[0].copy()
    (asked,) = (tmp_path / "asked").iterdir()
    for name, shards, factor in (("network", test, 2.0), ("images", train, 1.0)):
        features(tmp_path / name, shards, factor=factor)
        (other,) = (tmp_path / name).iterdir()
        shutil.rmtree(asked)
        shutil.copytree(other, asked)
        caplog.clear()
        values, _, seen = features(tmp_path / "asked", test)
        assert seen == 31
        assert [record.getMessage().partition(" holds ")[2] for record in caplog.records] == [
            "features of another network, other images or other settings, as its pass.json says: "
            "its features are computed again"
        ]
        np.testing.assert_array_equal(values, expected)
        assert features(tmp_path / "asked", test)[2] == 0


def test_an_interrupted_pass_leaves_nothing(test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(passes, "forward_passes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, test)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_before_anything_is_computed(
    test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RowsFile) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowsFile, "create", full)
    monkeypatch.setattr(passes, "forward_passes", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(OSError, match="No space left"):
        features(tmp_path, test)
    assert not list(tmp_path.iterdir())


def on_a_rank(folder: Path, shards: str) -> tuple[np.ndarray, list[int], int]:
    return features(folder, shards, batch_size=2)


@pytest.mark.parametrize(("count", "ranks", "shares"), [(5, 3, [2, 2, 1]), (4, 3, [2, 2, 0])])
def test_several_processes_compute_each_image_once(
    count: int, ranks: int, shares: list[int], write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = str(write_shards(tmp_path / "shards", list(range(count))))
    alone, labels, _ = features(tmp_path / "alone", shards, batch_size=2)
    found = run_on_ranks(on_a_rank, tmp_path / "together", shards, world_size=ranks)
    assert [seen for _, _, seen in found] == shares
    for values, its_labels, _ in found:
        np.testing.assert_allclose(values, alone, rtol=1e-6)
        assert its_labels == labels == list(range(count))
    assert len(list((tmp_path / "together").iterdir())) == 1
    assert [seen for _, _, seen in run_on_ranks(on_a_rank, tmp_path / "together", shards)] == [0, 0]


def test_features_are_those_of_extraction_in_memory(test: str, tmp_path: Path) -> None:
    from ssl_pipeline.eval.features.extract import extract_features

    expected, _ = extract_features(MeanColour(), open_shards(test), PREPROCESSING, batch_size=7, workers=0)
    assert torch.equal(torch.from_numpy(features(tmp_path, test)[0]), expected)

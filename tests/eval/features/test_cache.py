from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssl_pipeline.eval.features.cache import cached


class Computation:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.times += 1
        return torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, -1])


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_features_are_computed_once(tmp_path: Path) -> None:
    compute = Computation()
    first, second = (cached(tmp_path / "cache", {"weights": "a"}, compute) for _ in range(2))
    assert compute.times == 1
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert second[1].dtype == torch.int64


def test_another_identity_is_another_file(tmp_path: Path) -> None:
    compute = Computation()
    for identity in ({"weights": "a"}, {"weights": "b"}, {"weights": "a", "size": 32}):
        cached(tmp_path, identity, compute)
    assert compute.times == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_directory_nothing_is_stored() -> None:
    compute = Computation()
    for _ in range(2):
        cached(None, {"weights": "a"}, compute)
    assert compute.times == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "other tensors"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save_file

    compute = Computation()
    cached(tmp_path, {"weights": "a"}, compute)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-8])
    elif damage == "flipped bit":
        content[-20] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"features": torch.zeros(4, 3)}, path)
    features, _ = cached(tmp_path, {"weights": "a"}, compute)
    assert compute.times == 2
    assert "is damaged" in caplog.text
    assert torch.equal(features, torch.arange(12.0).view(4, 3))
    cached(tmp_path, {"weights": "a"}, compute)
    assert compute.times == 2


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", {"weights": "a"}, interrupted)
    assert not list(tmp_path.rglob("*"))

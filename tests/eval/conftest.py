"""A small labelled data set in shards, and a run that has ended."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, save_backbone
from ssl_pipeline.data.shards.manifest import Manifest, write_manifest

NUM_CLASSES = 6
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
PREPROCESSING = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

WriteShards = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_tar(directory: Path, labels: Sequence[int | None], *, names: Sequence[str] = (), seed: int = 0) -> Path:
    """One shard of 16 x 16 images whose colour tells their class, under noise."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with tarfile.open(directory / "images-000000.tar", "w") as shard:
        for number, label in enumerate(labels):
            colour = np.random.default_rng(label or 0).uniform(40, 215, size=3)
            pixels = np.clip(colour + generator.normal(0, 25, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format="png")
            members = {f"{number:04d}.png": encoded.getvalue()}
            if label is not None:
                members[f"{number:04d}.cls"] = str(label).encode()
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    if names:
        write_manifest(directory, Manifest(class_names=names))
    return directory


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    return write_tar


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return PREPROCESSING


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = [number % NUM_CLASSES for number in range(72)]
    return str(write_tar(tmp_path_factory.mktemp("train"), labels, seed=1))


@pytest.fixture(scope="session")
def test(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = [number % NUM_CLASSES for number in range(31)]
    return str(write_tar(tmp_path_factory.mktemp("test"), labels, seed=2))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    config = BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT)
    torch.manual_seed(5)
    save_backbone(directory, create_backbone(config), PREPROCESSING)
    (directory / "config.yaml").write_text("method: {name: dino}\n")
    return directory

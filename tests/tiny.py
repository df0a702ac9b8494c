"""Every method in its smallest form, and images for it: one row of TINY per method of METHODS."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import Config
from ssl_pipeline.methods import METHODS, build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.schedule import Progress

VIT = BackboneConfig(
    name="vit_tiny_patch16_224",
    arguments={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
CNN = BackboneConfig(name="resnet10t", arguments={"stem_type": ""}, small_images=True)
PROJECTOR = {"projector_hidden_dim": 16, "projector_dim": 8}


@dataclass(frozen=True)
class Tiny:
    """Settings of a method, and of each group of views its number and size in pixels."""

    settings: dict[str, object]
    views: dict[str, tuple[int, int]]


TINY = {
    "byol": Tiny({**PROJECTOR, "predictor_hidden_dim": 16}, {"view": (2, 16)}),
    "dino": Tiny(
        {"num_prototypes": 12, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "freeze_prototypes_for": 1},
        {"global": (2, 16), "local": (3, 8)},
    ),
    "fixmatch": Tiny({"num_classes": 3, "threshold": 0.4}, {"weak": (1, 16), "strong": (1, 16)}),
    "mae": Tiny({"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}, {"image": (1, 16)}),
    "moco": Tiny({**PROJECTOR, "queue_size": 64, "symmetric": True}, {"view": (2, 16)}),
    "moco_v3": Tiny({**PROJECTOR, "predictor_hidden_dim": 16}, {"view": (2, 16)}),
    "simclr": Tiny(dict(PROJECTOR), {"view": (2, 16)}),
    "simsiam": Tiny({**PROJECTOR, "predictor_hidden_dim": 8}, {"view": (2, 16)}),
}

CONFIGS: dict[str, type[Config]] = {get_args(config.model_fields["name"].annotation)[0]: config for config in METHODS}


def row(name: str) -> Tiny:
    assert name in TINY, f"tests/tiny.py has no row for the method '{name}': add one to TINY"
    return TINY[name]


def make_method(name: str, *, backbone: BackboneConfig = VIT, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return build_method(CONFIGS[name](name=name, **row(name).settings), create_backbone(backbone))


def make_batch(name: str, *, num_images: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Random views for the method `name`; those of its labelled groups in a batch of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(groups: Iterable[str]) -> dict[str, torch.Tensor]:
        sizes = {group: row(name).views[group] for group in groups}
        return {
            group: torch.randn(count, num_images, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
            for group, (count, size) in sizes.items()
        }

    labels, index = torch.arange(num_images) % 3, torch.arange(num_images)
    method = METHODS[CONFIGS[name]]
    views = draw(group for group in row(name).views if group in (*method.view_groups, *method.optional_view_groups))
    labelled = draw(method.labelled_view_groups)
    return Batch(views, labels, index, labelled=Batch(labelled, labels, index) if labelled else None)


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """The images of one rank: the rank-th of equal slices."""
    size = len(batch.sample_ids) // world_size
    here = slice(rank * size, (rank + 1) * size)
    views = {group: tensor[:, here] for group, tensor in batch.views.items()}
    labelled = share_of(batch.labelled, rank, world_size) if batch.labelled is not None else None
    return Batch(views, batch.labels[here], batch.sample_ids[here], labelled=labelled)


def progress_at(step: int) -> Progress:
    return Progress(step=step, total_steps=10, steps_per_epoch=5)


class GlobalNoise:
    """Stands in for `torch.rand`: (B, ...) uniforms that are this rank's rows of those of the global batch."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.calls = rank, world_size, 0

    def __call__(self, size: tuple[int, ...], *, device: torch.device | str | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        numbers = torch.empty(self.world_size * size[0], *size[1:]).uniform_(generator=generator)
        return numbers.chunk(self.world_size)[self.rank].to(device)


def write_shards(folder: Path, counts: tuple[int, ...] = (20, 17, 11), *, corrupt: tuple[int, ...] = ()) -> Path:
    """Labelled PNG images of noise in one tar per count; the bytes of the samples in `corrupt` are none."""
    folder.mkdir(parents=True)
    sample = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"part-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for _ in range(count):
                image = b"no image at all" if sample in corrupt else _png(sample)
                for name, content in ((f"{sample:04d}.png", image), (f"{sample:04d}.cls", str(sample % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                sample += 1
    return folder


def _png(sample: int) -> bytes:
    pixels = np.random.default_rng(sample).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()

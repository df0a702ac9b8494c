"""Every method in its smallest form, and images for it, worked out from its config and from what it needs."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from ssl_pipeline.augment.masks import draw_masks
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch, MaskRule, RunFacts, Views
from ssl_pipeline.config import Config
from ssl_pipeline.files import write_tensors
from ssl_pipeline.methods import METHODS, build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.modules.tokenizer import Tokenizer, save_tokenizer
from ssl_pipeline.schedule import Progress, Schedule

VIT = BackboneConfig(
    name="vit_tiny_patch16_224",
    arguments={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
CNN = BackboneConfig(name="test_resnet", arguments={"stem_type": ""}, small_images=True)
# by the end of a setting's name: a size that takes a CPU a moment
SMALL = {
    "_dim": 16,
    "num_prototypes": 12,
    "num_tokens": 12,
    "queue_size": 64,
    "_depth": 1,
    "_heads": 2,
    "num_classes": 3,
}
OWN: dict[str, dict[str, object]] = {
    "beit": {"num_masked": 6, "min_block": 2},
    "dvae": {"reconstruction": "mse", "kl_weight": Schedule(value=0.1)},
    "dino": {"freeze_prototypes_for": 1},
    "dinov2": {"freeze_prototypes_for": 1, "patch_head": "separate", "num_patch_prototypes": 10, "koleo_weight": 2.0},
    "dinov3": {
        "freeze_prototypes_for": 1,
        "num_patch_prototypes": 10,
        "teacher_temperature": {"value": 0.01},  # prototypes begin small: codes that differ
        "gram": {"first": 1, "every": 2},
    },
    "adamatch": {"unlabelled_weight": {"value": 1.0}, "distribution_window": 4},
    "co_training": {"threshold": 0.4},
    "fixmatch": {"threshold": 0.4},
    "flexmatch": {"threshold": 0.4},
    "freematch": {"fairness_weight": 0.5, "statistics_momentum": 0.9},
    "mean_teacher": {"consistency_weight": {"value": 20.0}},
    "mixmatch": {"unlabelled_weight": {"value": 20.0}},
    "pi_model": {"consistency_weight": {"value": 20.0}},
    "pseudo_label": {"threshold": 0.4, "unlabelled_weight": {"value": 1.0}},
    "remixmatch": {"unlabelled_weight": {"value": 1.5}, "unmixed_weight": {"value": 0.5}, "distribution_window": 4},
    "softmatch": {"statistics_momentum": 0.9},
    "supervised": {"label_smoothing": 0.1, "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "temporal_ensembling": {"consistency_weight": {"value": 20.0}},
    "uda": {"threshold": 0.3, "annealing": "linear"},
    "ibot": {"freeze_prototypes_for": 1, "patch_head": "own_prototypes", "num_patch_prototypes": 10},
    "moco": {"symmetric": True},
    "simmim": {"mask_size": 8},
    "swav": {"queue_size": 16, "queue_starts": 0, "freeze_prototypes_for": 1},  # full after two steps
}
"""What a method's tests need beside that."""
FOLDER = tempfile.TemporaryDirectory(prefix="tiny-methods-")


@cache
def teacher_settings() -> dict[str, object]:
    """A network with more patches than the student has, and its weights in a file."""
    arguments = VIT.arguments | {"patch_size": 2, "embed_dim": 20}
    path = Path(FOLDER.name) / "teacher.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        teacher = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments=arguments))
    write_tensors(path, teacher.model.state_dict())
    return {"teacher": BackboneConfig(name="vit_tiny_patch16_224", arguments=arguments, weights=str(path))}


OTHER_NETWORK = (0.5, 0.5, 0.5)
"""Mean and deviation of the images of a network that is not trained."""


@cache
def tokenizer_settings() -> dict[str, object]:
    """A tokenizer of twelve codes, one for each patch of the tiny ViT."""
    path = Path(FOLDER.name) / "tokenizer.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(8)
        tokenizer = Tokenizer(create_backbone(VIT), 12)
    save_tokenizer(path, tokenizer, mean=OTHER_NETWORK, std=OTHER_NETWORK)
    return {"tokenizer": path}


FILES: dict[str, Callable[[], dict[str, object]]] = {
    "beit": tokenizer_settings,
    "distillation": teacher_settings,
}
"""Settings that lead to files, which are made at their first use."""
PREPARED = ("adamatch", "flexmatch", "freematch", "remixmatch", "softmatch", "temporal_ensembling")
"""What remembers images or classes, of which `prepare` knows the number."""
COUNTS = {"global": 2, "gram": 2, "local": 3}
SIZES = {"gram": 24, "local": 8}

CONFIGS: dict[str, type[Config]] = {
    get_args(method.config_class.model_fields["name"].annotation)[0]: method.config_class for method in METHODS
}
CLASSES: dict[str, type[Method]] = {
    name: method for method in METHODS for name in CONFIGS if CONFIGS[name] is method.config_class
}


def tiny_settings(name: str) -> dict[str, object]:
    """The settings of the method `name` in its smallest form."""
    fields = CONFIGS[name].model_fields
    small = {field: value for field in fields for end, value in SMALL.items() if field.endswith(end)}
    files = FILES[name]() if name in FILES else {}
    return {"name": name, **small, **files, **OWN.get(name, {})}


def make_method(name: str, *, backbone: BackboneConfig = VIT, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = build_method(CONFIGS[name](**tiny_settings(name)), create_backbone(backbone))
    if name in FILES or name in PREPARED:  # what is in the files is read before a run begins, and not before
        sizes = {views.name: (view_shape(views)[1],) for views in method.needs}
        method.prepare(RunFacts(100, 3, 8, sizes, mean=(0.5,) * 3, std=(0.5,) * 3))
    return method


@cache
def needs(name: str) -> tuple[Views, ...]:
    return make_method(name).needs


def view_shape(views: Views) -> tuple[int, int]:
    """How many tiny views a group has, and their side in pixels."""
    return views.count or COUNTS.get(views.name, 1), SIZES.get(views.name, 16)


def takes_cnn(name: str) -> bool:
    """Whether the method `name` works without patches."""
    return all(views.mask is None for views in needs(name))


def make_batch(name: str, *, num_images: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Random views and masks for the method `name`; those of its labelled groups in a batch of their own."""
    generator = torch.Generator().manual_seed(seed)
    views: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    masks = {}
    for group in needs(name):
        count, size = view_shape(group)
        drawn = torch.randn(count, num_images, 3, size, size, generator=generator, dtype=torch.float64)
        views[group.labelled][group.name] = drawn.to(dtype)
        if group.mask is not None:
            masks[group.name] = make_masks(group.mask, count, num_images, size, generator=generator)
    labels, sample_ids = torch.arange(num_images) % 3, torch.arange(num_images)
    labelled = Batch(views[True], labels, sample_ids) if views[True] else None
    return Batch(views[False], labels, sample_ids, masks, labelled)


def make_masks(
    rule: MaskRule, num_views: int, num_images: int, size: int, *, generator: torch.Generator
) -> torch.Tensor:
    """(V, B, L) masks: as many patches as `ratio` says at random places or, for a pair, some or none; where the rule
    counts otherwise, those of the data path."""
    if rule.kind == "units" or rule.num_masked is not None:
        states = torch.randint(2**62, (num_views, num_images), generator=generator).numpy().astype(np.uint64)
        return torch.from_numpy(draw_masks(rule, size, states))
    num_patches = (size // rule.patch_size) ** 2
    order = torch.rand(num_views, num_images, num_patches, generator=generator).argsort(dim=-1)
    if not isinstance(rule.ratio, tuple):
        return order >= rule.num_kept(num_patches)
    low, high = rule.ratio
    ratios = low + (high - low) * torch.rand(num_views, num_images, 1, generator=generator)
    ratios[:, ::2] = 0.0
    return order < (num_patches * ratios).ceil()


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """The images of one rank: the rank-th of equal slices."""
    size = len(batch.sample_ids) // world_size
    here = slice(rank * size, (rank + 1) * size)
    views = {group: tensor[:, here] for group, tensor in batch.views.items()}
    masks = {group: tensor[:, here] for group, tensor in batch.masks.items()}
    labelled = share_of(batch.labelled, rank, world_size) if batch.labelled is not None else None
    return Batch(views, batch.labels[here], batch.sample_ids[here], masks, labelled)


def progress_at(step: int) -> Progress:
    return Progress(step=step, total_steps=10, steps_per_epoch=5)


def write_shards(
    folder: Path, counts: tuple[int, ...] = (20, 17, 11), *, corrupt: tuple[int, ...] = (), cut: tuple[int, ...] = ()
) -> Path:
    """Labelled PNG images of noise in one tar per count.

    The bytes of the samples in `corrupt` are none, and those of the samples in `cut` end in the midst of their pixels.
    """
    folder.mkdir(parents=True)
    sample = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"part-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for _ in range(count):
                image = b"no image at all" if sample in corrupt else _png(sample)[: 100 if sample in cut else None]
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

"""Rows of real runs for the doctor's tests: small networks on scikit-learn's digits, healthy ones of most methods, and
some with a disease that settings can give them.

`python -m tests.run.doctor.record [NAME ...]` makes the files in `recorded/` anew: 5 to 10 minutes on one core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from ssl_pipeline.batch import Views
from ssl_pipeline.config import Config, Tree, read_yaml
from ssl_pipeline.files import write_text
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from tests.runs import _pretrain, needs_labels, rows, write_recipe
from tests.tiny import CONFIGS, FILES, FOLDER, needs, takes_cnn, tiny_settings, view_shape

RECORDED = Path(__file__).with_name("recorded")
STEPS, STEPS_OF_FEW_LABELS = 200, 100
CNN: Tree = {"name": "test_resnet", "arguments": {"stem_type": ""}, "small_images": True}
VIT: Tree = {
    "name": "vit_tiny_patch16_224",
    "arguments": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4},
}
# by the end of a setting's name: as much as digits need
SIZES: dict[str, object] = {
    "bottleneck_dim": 32,
    "hidden_dim": 128,
    "decoder_dim": 32,
    "projector_dim": 64,
    "num_prototypes": 128,
    "queue_size": 1024,
    "freeze_prototypes_for": 10,
    "num_classes": 10,
    "teacher_momentum": 0.95,
}
OWN: dict[str, dict[str, object]] = {
    "dinov2": {"koleo_weight": 0.1, "centring": "sinkhorn_knopp", "teacher_temperature": 0.04},
    "dinov3": {"gram": None},
    "fixmatch": {"num_classes": 10, "threshold": 0.8},
    "ibot": {"teacher_temperature": 0.04, "patch_teacher_temperature": 0.04, "head_bottleneck_dim": 64},
    "simmim": {"mask_size": 4},
    "swav": {"queue_size": 0},
}
SGD: Tree = {"name": "sgd", "lr": {"value": 0.03, "warmup": 10, "final": 0.0}, "weight_decay": 5e-4}
ADAMW: Tree = {"name": "adamw", "lr": {"value": 2e-3, "warmup": 10, "final": 1e-5}, "weight_decay": 0.04}
WITH_SGD = {"simclr", "moco", "moco_v3", "byol", "simsiam", "nnclr", "fixmatch"}

# iBOT collapses at this size, and is among the sick; a dVAE takes ten times as long as the others
FEW_LABELS = {
    name for name, config in CONFIGS.items() if name != "fixmatch" and any(views.labelled for views in needs(name))
}
WITHOUT_HEALTH = {"ibot"}
# DINOv2 learns in a short run with a sharp teacher, many prototypes and views that share much
LONGER: dict[str, list[str]] = {
    "dinov2": [
        "method.teacher_temperature=0.02",
        "method.centring=centring",
        "method.patch_head=shared",
        "method.num_patch_prototypes=null",
        "method.num_prototypes=1024",
        "method.teacher_momentum=0.98",
        "augment.global.jitter_prob=0.3",
        "augment.local.jitter_prob=0.3",
        "augment.global.scale=[0.6,1.0]",
        "train.steps=400",
        "train.log_every=16",
    ]
}
FINE_TUNED, BEFORE = "healthy_fine_tuned", "healthy_mae"  # a ViT on all labels, from what MAE has made of it
HEALTHY: dict[str, tuple[str, list[str]]] = {
    f"healthy_{name}": (name, LONGER.get(name, [])) for name in CONFIGS if name not in WITHOUT_HEALTH
} | {FINE_TUNED: ("supervised", [])}
SICK: dict[str, tuple[str, list[str]]] = {
    "byol_teacher_too_slow": ("byol", ["method.teacher_momentum=0.9999"]),
    "dino_rate_30": ("dino", ["optim={name: sgd, lr: {value: 30.0}}"]),
    "dino_teacher_too_warm": ("dino", ["method.teacher_temperature=1.0"]),
    "dino_without_centring": ("dino", ["method.centre_momentum=0.99999", "method.teacher_temperature=0.02"]),
    "mae_rate_1": ("mae", ["optim.lr.value=1.0"]),
    "mae_rate_climbs": (
        "mae",
        ["optim={name: sgd, lr: {value: 30.0, start: 0.01, warmup: 100%}}", "train.log_every=1"],
    ),
    "moco_rate_10": ("moco", ["optim.lr.value=10.0"]),
    "simclr_rate_30": ("simclr", ["optim.lr.value=30.0"]),
    "simclr_rate_zero": ("simclr", ["optim.lr.value=0.0"]),
    "dinov2_too_short": ("dinov2", []),
    "ibot_too_short": ("ibot", []),
    "vicreg_without_variance": ("vicreg", ["method.variance_weight=0", "method.covariance_weight=0"]),
}
CASES = HEALTHY | SICK


def record(case: str, shards: dict[str, Path], folder: Path) -> dict[str, object]:
    """Run a case in `folder`; its settings and its rows, floats to four digits, without times."""
    name, settings = CASES[case]
    steps = STEPS_OF_FEW_LABELS if name in FEW_LABELS and case != FINE_TUNED else STEPS
    labelled = ["data.labelled.batch_size=32"] if needs_labels(name) and case != FINE_TUNED else []
    sections: dict[str, object] = {
        "method": method_settings(name),
        "optim": SGD if name in WITH_SGD else ADAMW,
        "train": {"steps": steps, "save_every": steps, "log_every": steps // 25, "hang_timeout": 0},
        **(monitors(shards) | network_and_views(name) if name not in FILES else {}),
    }
    if case == FINE_TUNED:
        if not (folder / BEFORE).exists():
            record(BEFORE, shards, folder)
        sections |= fine_tuning(shards["train"], folder / BEFORE)
    recipe = write_recipe(folder / f"{case}.yaml", name, shards["train"], **sections)
    output = folder / case
    data = ["data.batch_size=64", "data.cache=true", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", *labelled]
    code = _pretrain([f"recipe={recipe}", f"output={output}", *data, *settings])
    config = read_yaml((output / "config.yaml").read_text(), where="config.yaml")
    return {"case": case, "exit_code": code, "config": config, "rows": [shortened(row) for row in rows(output)]}


def fine_tuning(shards: Path, weights: Path) -> dict[str, Tree]:
    """As the recipe finetune_vit_small, at this size."""
    (view,) = (views for views in needs("supervised") if views.labelled)
    return {
        "method": {
            "name": "supervised",
            "learns_from": "all",
            "label_smoothing": 0.1,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
            "mixing_share": 0.2,
            "layer_decay": 0.75,
            "teacher_momentum": 0.0,
        },
        "backbone": VIT | {"drop_path": 0.1, "weights": str(weights)},
        "augment": {"view": view_settings(view) | {"scale": [0.8, 1.0], "jitter_prob": 0.0}},
        "optim": ADAMW | {"lr": {"value": 5e-3, "warmup": 10, "final": 1e-5}},
        "data": {"shards": str(shards), "workers": 0},
    }


def method_settings(name: str) -> dict[str, object]:
    fields = CONFIGS[name].model_fields
    sizes = {field: value for field in fields for end, value in SIZES.items() if field.endswith(end)}
    return {key: plain(value) for key, value in (tiny_settings(name) | sizes | OWN.get(name, {})).items()}


def plain(value: object) -> object:
    """A setting as a recipe writes it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value


def monitors(shards: dict[str, Path]) -> dict[str, Tree]:
    """Not for methods that learn from a network in a file: in tests/tiny.py it knows nothing, and they learn that."""
    train, val = str(shards["train"]), str(shards["test"])
    return {
        "knn": {"every": "20%", "train": train, "val": val, "k": 20, "at_start": True},
        "spectrum": {"every": "20%", "images": 512, "at_start": True},
    }


def network_and_views(name: str) -> dict[str, Tree]:
    views: Tree = {views.name: view_settings(views) for views in needs(name) if views.name != "gram"}
    return {"backbone": CNN if takes_cnn(name) else VIT, "augment": views}


def view_settings(views: Views) -> Tree:
    """As in the recipes for digits: no flips, for these mean something else when mirrored."""
    is_local = views.name == "local"
    count, _ = view_shape(views)
    crop: Tree = {"count": count, "size": 6 if is_local else 8, "scale": [0.4, 0.8] if is_local else [0.5, 1.0]}
    return crop | {"flip_prob": 0.0, "saturation": 0.0, "hue": 0.0, "gray_prob": 0.0}


def shortened(row: dict[str, float]) -> dict[str, object]:
    times = ("images_per_second", "data_wait")  # the machine's, not the run's
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) and name != "epoch" else value
        for name, value in row.items()
        if name not in times
    }


def digits(folder: Path) -> dict[str, Path]:
    for split in ("train", "test"):
        make_shards(MakeShards(source="digits", split=split, output=folder / split))
    return {split: folder / split for split in ("train", "test")}


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = digits(Path(folder))
        for case in cases or CASES:
            recorded = record(case, shards, Path(folder))
            lines = json.dumps(recorded.pop("rows")).replace("}, {", "},\n{")
            text = f'{json.dumps(recorded)[:-1]}, "rows": [\n{lines[1:-1]}\n]}}\n'.replace(folder, "DIR").replace(
                FOLDER.name, "DIR"
            )
            RECORDED.mkdir(exist_ok=True)
            write_text(RECORDED / f"{case}.json", text)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a run has exported, and whether that is the newest that it has: runs are extended, and some fail then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssl_pipeline.files import JSON, sha256_of, sha256_of_bytes
from ssl_pipeline.run.checkpoint_files import read_manifest
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import read_status


def exported_step(run: Path) -> int | None:
    """The optimizer steps that made what a run has exported; None where that is not known."""
    try:
        step = json.loads((run / "backbone.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def takes_export(run: Path, *, which: str | None = None, step: int | None = None) -> bool:
    """Whether what is asked for of a run is its backbone.safetensors, and not in a checkpoint.

    Without `which` and `step` it is the newest backbone: the export, unless the run was extended after it and has a
    newer checkpoint.
    """
    if which is not None or not (run / "backbone.safetensors").is_file():
        return False
    exported, newest = exported_step(run), Checkpoints(run / "checkpoints").newest()
    if step is not None:
        return exported == step
    if newest is None:
        return True
    if exported is None:  # by ssl-pipeline 0.2.0, which exported after it was done
        status = read_status(run)
        return status is None or status.state == "done"
    return exported >= newest[1].state.step


def about_weights(weights: str, tensors: Mapping[str, Tensor]) -> dict[str, JSON]:
    """What run.json tells of the weights that a run starts from: the setting, a SHA-256, and the run they are of.

    weights: a file, a run, one of its checkpoints, or a tag; of a tag it is the SHA-256 of the `tensors` themselves.
    """
    place = Path(weights)
    if place.is_dir() and takes_export(place):
        place = place / "backbone.safetensors"
    if place.is_file():
        run = place.parent
        is_export = place.name == "backbone.safetensors" and (run / "config.yaml").is_file()
        parent: JSON = {"run": str(run), "step": exported_step(run)} if is_export else None
        return {"from": weights, "sha256": sha256_of(place), "parent run": parent}
    found = Checkpoints(place / "checkpoints").newest() if place.is_dir() else None
    if place.is_dir() and found is None:
        found = place, read_manifest(place)
    if found is not None:
        checkpoint, manifest = found
        parent = {"run": str(checkpoint.parent.parent), "step": manifest.state.step}
        return {"from": weights, "sha256": manifest.files["method.safetensors"][1], "parent run": parent}
    parts = [part for name, tensor in tensors.items() for part in (name.encode(), _bytes_of(tensor))]
    return {"from": weights, "sha256": sha256_of_bytes(*parts), "parent run": None}


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

"""What a run has exported, and whether it has anything newer: runs are extended, and may fail after that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ssl_pipeline.files import JSON, sha256_of_tensors
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
    """Whether the requested backbone of a run is its backbone.safetensors, not one in a checkpoint.

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


def about_weights(
    weights: str, *, which: str | None, sha256: str | None, tensors: Mapping[str, Tensor]
) -> dict[str, JSON]:
    """What run.json says about the weights that a run starts from: the setting, a SHA-256, and their run.

    sha256: of the file; for a tag, which has no file here, that of the `tensors`.
    """
    return {
        "from": weights,
        "sha256": sha256_of_tensors(tensors) if sha256 is None else sha256,
        "parent run": _parent_of(Path(weights), which),
    }


def _parent_of(place: Path, which: str | None) -> JSON:
    """The run and the step of a run's directory, of one of its checkpoints, or of its export; None of anything else."""
    if place.is_dir() and takes_export(place, which=which):
        place = place / "backbone.safetensors"
    if place.is_file():
        is_export = place.name == "backbone.safetensors" and (place.parent / "config.yaml").is_file()
        return {"run": str(place.parent), "step": exported_step(place.parent)} if is_export else None
    found = Checkpoints(place / "checkpoints").newest()
    if found is None and (place / "manifest.json").is_file():
        found = place, read_manifest(place)
    if found is None:
        return None
    checkpoint, manifest = found
    return {"run": str(checkpoint.parent.parent), "step": manifest.state.step}

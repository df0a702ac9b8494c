"""What a run has exported, and whether that is the newest that it has: runs are extended, and some fail then."""

from __future__ import annotations

import json
from pathlib import Path

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
    exported, newest = exported_step(run), Checkpoints(run / "checkpoints").newest_step()
    if step is not None:
        return exported == step
    if newest is None:
        return True
    if exported is None:  # by ssl-pipeline 0.2.0, which exported after it was done
        status = read_status(run)
        return status is None or status.state == "done"
    return exported >= newest

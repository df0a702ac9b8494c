"""The backbones of a run: the one that it exported, and any one of its checkpoints.

What a checkpoint holds is in its manifest, so no method is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.backbones.config import BackboneConfig, architecture_of
from ssl_pipeline.backbones.create import create_backbone
from ssl_pipeline.backbones.exported import exported_step, takes_export
from ssl_pipeline.backbones.files import load_backbone
from ssl_pipeline.backbones.networks import Backbone
from ssl_pipeline.backbones.preprocessing import Preprocessing
from ssl_pipeline.backbones.weights import Origin, find_in_run, require_floats, tensors_of
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.files import sha256_of
from ssl_pipeline.run.checkpoint_files import Checkpoint
from ssl_pipeline.run.directory import require_directory
from ssl_pipeline.run.state import SavedBackbone


@dataclass(frozen=True)
class BackboneOfRun:
    """A backbone with its place: the path and the SHA-256 of its file.

    name: that of a checkpoint; None for the exported one. step: None where an export does not state it.
    """

    name: str | None
    backbone: Backbone
    preprocessing: Preprocessing
    path: Path
    step: int | None
    sha256: str


def require_run(run: Path) -> None:
    """Raise ConfigError for what is not a directory, and for one without an export and a checkpoint."""
    require_directory(run)
    if not any((run / name).exists() for name in ("backbone.safetensors", "checkpoints", "manifest.json")):
        find_in_run(run)  # says what is missing


def load_run(run: Path, *, which: str | None = None, step: int | None = None) -> BackboneOfRun:
    """The newest backbone of the run, be it exported or in a checkpoint, or that of one step, or another one by name.

    Raises ConfigError as `load_from_checkpoint` does, and if there is no such directory.
    """
    require_run(run)
    if run.parent.name == "checkpoints" and (run / "manifest.json").is_file():
        raise ConfigError(f"run={run} must be the directory of a run. It is a checkpoint of {run.parent.parent}.")
    if not takes_export(run, which=which, step=step):
        return load_from_checkpoint(run, which=which, step=step)
    file = run / "backbone.safetensors"
    backbone, preprocessing = load_backbone(run)
    return BackboneOfRun(None, backbone, preprocessing, file, exported_step(run), sha256_of(file))


def load_from_checkpoint(run: Path, *, which: str | None = None, step: int | None = None) -> BackboneOfRun:
    """The backbone `which` (the one that the run exports if None) of the newest whole checkpoint, or of one step.

    The run may still be training. Raises ConfigError if it has no such backbone or no such checkpoint.
    """
    checkpoint, name, saved = find_in_run(run, which=which, step=step)
    preprocessing = Preprocessing(saved.size, saved.mean, saved.std)
    backbone = _build(checkpoint, saved)
    backbone.preprocessing = preprocessing
    backbone.origin = Origin(f"{name} of step {checkpoint.state.step} of {run}", checkpoint.sha256["method"])
    return BackboneOfRun(
        name=name,
        backbone=backbone,
        preprocessing=preprocessing,
        path=checkpoint.path,
        step=checkpoint.state.step,
        sha256=checkpoint.sha256["method"],
    )


def _build(checkpoint: Checkpoint, saved: SavedBackbone) -> Backbone:
    """The network that its config describes, with the tensors of the checkpoint in place of those it began with."""
    backbone = create_backbone(validate(BackboneConfig, architecture_of(saved.config)))
    tensors = tensors_of(checkpoint, saved.prefix)
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(
            f"{checkpoint.path} holds a backbone that this version builds differently: {' '.join(str(error).split())}."
        ) from None
    weights = ((name, tensors[name]) for name, own in backbone.state_dict().items() if own.is_floating_point())
    require_floats(weights, source=str(checkpoint.path))
    return backbone

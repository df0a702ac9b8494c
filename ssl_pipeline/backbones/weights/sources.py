"""What `backbone.weights` names: a pretrained tag of timm, a file, a run, or one of its checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ssl_pipeline.backbones.exported import takes_export
from ssl_pipeline.backbones.weights.loading import load_weights
from ssl_pipeline.backbones.weights.reading import read_tensors
from ssl_pipeline.config import ConfigError, nearest
from ssl_pipeline.files import sha256_of
from ssl_pipeline.run.checkpoint_files import Checkpoint, load_checkpoint
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import holder_of
from ssl_pipeline.run.doctor.records import read_rows, settings_of
from ssl_pipeline.run.state import SavedBackbone
from ssl_pipeline.schedule import Duration

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
ON_THE_HUB = re.compile(r"^(https://)?(hf[-_]hub:|huggingface\.co/)?timm/")
FILES = ("backbone.safetensors", "model.safetensors", "pytorch_model.bin")
"""What is read of a directory: a run's export, or a model of Hugging Face."""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a backbone come from, in words; and the SHA-256 of the file, if they come from one."""

    text: str
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.text}; SHA-256 {self.sha256[:16]}" if self.sha256 else self.text


RANDOM = Origin("random initialisation")


def is_tag(weights: str) -> bool:
    """Whether `backbone.weights` is neither a file nor a directory, nor looks like one."""
    path = Path(weights).expanduser()
    return not (path.exists() or weights.endswith(WEIGHT_SUFFIXES) or "/" in weights)


def without_hub(name: str) -> str:
    """A timm name without its prefix on the hub, such as `timm/` and `hf-hub:timm/`."""
    return ON_THE_HUB.sub("", name)


def without_name(weights: str, name: str) -> str:
    """Only the tag where it is given with the architecture before it: a1_in1k of resnet18.a1_in1k."""
    return weights.removeprefix(f"{name}.") if is_tag(weights) else weights


def to_be_fetched(name: str) -> str | None:
    """Where timm's weights of this name are fetched from; None if they are here already."""
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.hf_hub_id:
        files = (published.hf_hub_filename,) if published.hf_hub_filename else FILES[1:]
        there = any(isinstance(try_to_load_from_cache(published.hf_hub_id, file), str) for file in files)
        return None if there else f"{published.hf_hub_id} of timm's hub"
    if published is not None and isinstance(published.url, str) and published.url:
        kept = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rpartition("/")[2]
        return None if kept.exists() else published.url
    return None


def require_place(weights: str, *, key: str = "backbone.weights") -> Path:
    """The file or directory that `key` names; ConfigError if there is none, or nothing in the directory to read."""
    path = Path(weights).expanduser()
    if not path.exists():
        tagged = without_hub(weights)
        hint = (
            f" timm's own are {key}={tagged}." if tagged != weights and timm.is_model(tagged.partition(".")[0]) else ""
        )
        raise ConfigError(
            f"{key}={weights} does not exist. Needed: a file, the directory of a run, or a tag of timm.{hint}"
        )
    if path.is_dir() and not holds_checkpoints(path) and not any((path / name).is_file() for name in FILES):
        raise ConfigError(
            f"{key}={weights} is a directory without weights: it has no checkpoints of a run, and no file called "
            f"{', '.join(FILES[:-1])} or {FILES[-1]}. Name a file in it, or another directory."
        )
    return path


def holds_checkpoints(path: Path) -> bool:
    """Whether a directory is that of a run that has saved something, or one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def file_of(path: Path, *, network: str | None) -> Path | None:
    """The file of weights at a place; None for the directory of a run of which a checkpoint is read."""
    file = next((path / name for name in FILES if (path / name).is_file()), None) if path.is_dir() else path
    if file is not None and file.name == FILES[0] and path.is_dir() and not takes_export(path, which=network):
        return None
    return file


def load_source(model: nn.Module, weights: str, *, network: str | None) -> Origin:
    """Fill a timm network from a file, a run or a checkpoint; says where the tensors come from, and how many.

    network: "teacher" or "student" of a file; of a run the name of a backbone. Raises ConfigError as `load_weights`,
    and if there is no such file, run or backbone.
    """
    path = require_place(weights)
    file = file_of(path, network=network)
    if file is None:
        checkpoint, name, saved = find_in_run(path, which=network)
        tensors = tensors_of(checkpoint, saved.prefix + "model.")
        taken = load_weights(model, tensors, source=str(checkpoint.path))
        where = f"{name} of step {checkpoint.state.step} of {checkpoint.path.parent.parent}"
        return Origin(f"{where}, {taken}", checkpoint.sha256["method"])
    if network not in (None, "teacher", "student"):
        raise ConfigError(f"backbone.weights_from must be teacher or student for a file. Got '{network}'.")
    taken = load_weights(model, read_tensors(file), source=str(file), network=network)
    return Origin(f"{file}, {taken}", sha256_of(file))


def find_in_run(
    run: Path, *, which: str | None = None, step: int | None = None
) -> tuple[Checkpoint, str, SavedBackbone]:
    """The newest whole checkpoint of a run or that of a step, with the name and place of one of its backbones.

    run: its directory, or that of one of its checkpoints. which: by default the backbone that the run exports. Raises
    ConfigError if there is no such checkpoint or backbone.
    """
    if (run / "manifest.json").is_file() and step is None and not (run / "checkpoints").is_dir():
        checkpoint = load_checkpoint(run, files=["method"])
    else:
        checkpoint = _find_checkpoint(run, which=which, step=step)
    known = checkpoint.state.backbones
    name = which or next(iter(known))
    if name not in known:
        raise ConfigError(
            f"run={run} has no backbone which={name}.{nearest(name, list(known))} It has {', '.join(known)}."
        )
    return checkpoint, name, known[name]


def _find_checkpoint(run: Path, *, which: str | None, step: int | None) -> Checkpoint:
    checkpoints = Checkpoints(run / "checkpoints", report=print)
    if step is not None:
        return checkpoints.load_step(step, files=["method"])
    newest = checkpoints.load_latest(files=["method"])
    if newest is None:
        export = "" if which else "backbone.safetensors, which pretraining writes when it ends, and no "
        raise ConfigError(f"run={run} has no {export}checkpoint{_way_to_the_first(run)}")
    return newest


def _way_to_the_first(run: Path) -> str:
    """What to do about a run without a checkpoint: wait for that of a run that trains, or train it."""
    holder = holder_of(run)
    if holder is None:
        return f". Train it first: accelerate launch pretrain.py recipe=NAME output={run}"
    rows, config = read_rows(run), run / "config.yaml"
    train = settings_of(config.read_text(encoding="utf-8")).get("train") if config.is_file() else None
    every = train.get("save_every") if isinstance(train, dict) else None
    step = f"at step {rows[-1]['step']} by metrics.jsonl" if rows else "with nothing in metrics.jsonl yet"
    due = ""
    if isinstance(every, int | str):
        after = f"after {every} steps" if isinstance(every, int) else f"after {every}"
        when = "when the run ends" if Duration(every).is_zero else after
        due = f", which is written {when} (train.save_every={every})"
    return f" yet. It is training ({holder}), {step}. Try again after its first checkpoint{due}."


def tensors_of(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's method file whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors["method"].items()
        if name.startswith(prefix)
    }

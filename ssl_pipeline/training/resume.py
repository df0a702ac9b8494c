"""Continuing a run: what its newest checkpoint must share with it, that every rank starts from the same one, and what
its config.yaml says afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue

from ssl_pipeline.config import (
    Config,
    ConfigError,
    dump,
    printable,
    read_yaml,
    sentences_of,
    validate,
)
from ssl_pipeline.distributed import gather
from ssl_pipeline.files import sha256_of_json
from ssl_pipeline.methods.base import Method
from ssl_pipeline.run.checkpoint_files import Checkpoint
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.optimizer_state import load_optimizer_tensors
from ssl_pipeline.training.changes import Change, changes, short
from ssl_pipeline.training.run import Output, Run
from ssl_pipeline.training.saving import export_run

LENGTH = {"train.epochs", "train.steps"}
STARTING_WEIGHTS = "starting weights"
"""In a run's identity: their SHA-256. It counts only where the setting that names them has changed."""
NUM_SHOWN = 4  # keys in a refusal


def load_newest(
    checkpoints: Checkpoints,
    method: Method,
    optimizer: torch.optim.Optimizer,
    run: Output,
    *,
    device: torch.device | str = "cpu",
) -> Checkpoint | None:
    """Load the newest checkpoint into method and optimizer; None, and nothing changed, if there is none.

    device: that of collectives.

    Raises ConfigError, with nothing changed, if the checkpoint belongs to another run than `run` describes, or if the
    ranks found different ones.
    """
    output = run.path
    saved = checkpoints.load_latest()
    if saved is not None:
        if run.settings is not None:
            check_settings(output, _settings_of(saved, run.settings, output), run.settings)
        _check_weights(output, saved, run)
        check_identity(output, saved.state.identity, run.identity)
        _check_tensors(output, saved, method)
        check_identity(output, saved.state.identity, optimizer_identity(method, optimizer))
    _check_ranks_agree(output, -1 if saved is None else saved.state.position, device)
    if saved is not None:
        method.load_state_dict(saved.tensors["method"])
        load_optimizer_tensors(optimizer, saved.tensors["optimizer"])
    return saved


def _settings_of(saved: Checkpoint, settings: Config, output: Path) -> Config:
    """The settings that a checkpoint was made with: its own, or those of the config.yaml next to an older one."""
    schema = type(settings)
    if saved.state.settings is not None:
        try:
            return validate(schema, json.loads(json.dumps(saved.state.settings)))
        except ConfigError as error:
            raise ConfigError(
                f"{saved.path} was made with settings that this version does not read ({sentences_of(error)[0]}) "
                "Choose another output=DIR."
            ) from None
    there = read_settings(schema, output)
    if there is None:
        raise ConfigError(
            f"{output} has checkpoints, but no config.yaml that says which run they belong to. Put it back, or choose "
            "another output=DIR."
        )
    return there


def optimizer_identity(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Part of a run's identity: the update rule and, hashed, the trained parameters in a checkpoint's order."""
    name_of = {parameter: name for name, parameter in method.named_parameters()}
    names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    digest = sha256_of_json(names)[:8]
    return {"optimizer": f"{type(optimizer).__name__} on {len(names)} tensors ({digest})"}


def begin_or_keep(run: Run, directory: RunDirectory, *, position: int, global_batch: int | None = None) -> None:
    """Mark the directory as that of a run which trains from `position` on, or keep the complete one that is there.

    What a run that goes on changes is said; global_batch: that of the steps before, None without any. A complete run
    keeps all that it has; only an export that is gone is made again. Raises ConfigError if the settings end before the
    point that an unfinished run has reached.
    """
    changed, step = _changes(directory, run.output.settings), run.clock.steps_made(position)
    shown = "; ".join(change.kept for change in changed)
    directory.checkpoint = step
    if run.clock.is_last(position):
        status = read_status(directory.path)
        done = status is not None and status.state == "done"
        if not done and any(change.key in LENGTH for change in changed):
            raise ConfigError(
                f"{directory.path} has an unfinished run that is past the end of these settings, which differ from its "
                f"own ({shown}). Choose another output=DIR, or its own settings."
            )
        if changed:
            _say(f"The run keeps the settings of its last start: {shown}")
        if not done:
            return
        if not (directory.path / "backbone.safetensors").is_file():
            export_run(run, directory.path, position=position)
        _say(f"The run in {directory.path} is complete already, at step {step}; nothing is left to train.")
        return
    if global_batch not in (None, run.clock.global_batch):  # by other settings, or by another number of processes
        changed.append(Change("global batch", global_batch, run.clock.global_batch, allowed=True))
    if changed:
        _say(f"Changed since the last start of this run: {'; '.join(map(str, changed))}")
    directory.status("running", step=step)
    if run.output.settings is not None:
        directory.write_config(dump(run.output.settings))
    directory.note_start({**run.output.about, "from_step": step, "from_images": position})


def read_settings(schema: type[Config], directory: Path) -> Config | None:
    """The settings in the config.yaml of a run, None without one; ConfigError if they cannot be read."""
    path = directory / "config.yaml"
    if not path.exists():
        return None
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
        return validate(schema, tree if isinstance(tree, dict) else {})
    except ValueError as error:
        raise ConfigError(
            f"{path} is not readable as the settings of a run ({str(error).splitlines()[0]}) "
            "Choose another output=DIR, or remove that run."
        ) from None


def check_settings(output: Path, there: Config, here: Config) -> None:
    """Raises ConfigError, with both values of each, if keys differ that a run keeps (`MayChange` marks the others)."""
    kept = [change for change in changes(there, here) if not change.allowed]
    if not kept:
        return
    shown, more = kept[:NUM_SHOWN], f" and {len(kept) - NUM_SHOWN} more" if len(kept) > NUM_SHOWN else ""
    theirs = ", ".join(f"{change.key}={short(change.before)}" for change in shown)
    ours = ", ".join(f"{change.key}={short(change.now)}" for change in shown)
    raise ConfigError(
        f"{output} holds a run with {theirs}{more}; this one has {ours}{more}. A run keeps these: set them as they "
        f"were to go on, or choose another output=DIR (backbone.weights={output} begins there with what it has learnt)."
    )


def _check_weights(output: Path, saved: Checkpoint, run: Output) -> None:
    """Raises ConfigError if backbone.weights names another path than before, with other content.

    The weights of a run that goes on are those of its checkpoint. So the same name is good whatever it holds by now (a
    run that was extended), and so is another name for the same bytes (a file that was moved).
    """
    before, now = (_weights_in(settings) for settings in (saved.state.settings, run.plain_settings()))
    there, here = (identity.get(STARTING_WEIGHTS) for identity in (saved.state.identity, run.identity))
    if saved.state.settings is not None and before != now and (there is None or there != here):
        raise ConfigError(
            f"{output} holds a run with backbone.weights={short(before)}; this one has {short(now)}, with other "
            "content. Set it as it was to go on, or choose another output=DIR."
        )


def _weights_in(settings: Mapping[str, JsonValue] | None) -> JsonValue:
    backbone = (settings or {}).get("backbone")
    return backbone.get("weights") if isinstance(backbone, dict) else None


def _changes(directory: RunDirectory, settings: Config | None) -> list[Change]:
    there = read_settings(type(settings), directory.path) if settings is not None else None
    return changes(there, settings) if there is not None and settings is not None else []


def _say(text: str) -> None:
    print(printable(text), flush=True)


def check_identity(output: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first fact in which the run in `output` differs from this one."""
    for name, mine in here.items():
        if name != STARTING_WEIGHTS and there.get(name) != mine:
            raise ConfigError(
                f"{output} holds a run with {name} {there.get(name)}; this one has {mine}. "
                "Choose another output=DIR, or remove that run."
            )


def _check_tensors(output: Path, saved: Checkpoint, method: Method) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.tensors["method"].items()}
    ours = {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{output} holds a run whose '{name}' has shape {theirs.get(name, '(it has none)')}; this one's has "
                f"{ours.get(name, '(it has none)')}. Use the settings of its config.yaml, or choose another output=DIR."
            )


def _check_ranks_agree(output: Path, position: int, device: torch.device | str) -> None:
    positions = gather(torch.tensor([position], device=device)).tolist()
    if len(set(positions)) > 1:
        found = ", ".join("none" if position < 0 else f"one at image {position}" for position in positions)
        raise ConfigError(
            f"The processes found different checkpoints in {output}: {found}. "
            "Put output=DIR on storage that all machines share."
        )

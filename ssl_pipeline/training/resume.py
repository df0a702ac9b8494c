"""Continuing a run: what its newest checkpoint must share with it, that every rank starts from the same one, and what
its config.yaml says afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ssl_pipeline.config import ConfigError, Value, printable, read_yaml
from ssl_pipeline.distributed import gather
from ssl_pipeline.files import sha256_of_json
from ssl_pipeline.methods.base import Method
from ssl_pipeline.run.checkpoint_files import Checkpoint
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.optimizer_state import load_optimizer_tensors


def load_newest(
    checkpoints: Checkpoints, method: Method, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> Checkpoint | None:
    """Load the newest checkpoint into method and optimizer; None, and nothing changed, if there is none.

    Raises ConfigError, with nothing changed, if the checkpoint belongs to another run or if the ranks found
    different ones.
    """
    output = checkpoints.directory.parent
    saved = checkpoints.load_latest()
    if saved is not None:
        check_identity(output, saved.state.identity, identity)
        _check_tensors(output, saved, method)
        check_identity(output, saved.state.identity, optimizer_identity(method, optimizer))
    _check_ranks_agree(output, -1 if saved is None else saved.state.position, next(method.parameters()).device)
    if saved is not None:
        method.load_state_dict(saved.tensors["method"])
        load_optimizer_tensors(optimizer, saved.tensors["optimizer"])
    return saved


def optimizer_identity(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Part of a run's identity: the update rule and, hashed, the trained parameters in a checkpoint's order."""
    name_of = {parameter: name for name, parameter in method.named_parameters()}
    names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    digest = sha256_of_json(names)[:8]
    return {"optimizer": f"{type(optimizer).__name__} on {len(names)} tensors ({digest})"}


def write_settings(directory: RunDirectory, settings: str, *, complete: bool) -> None:
    """Keep config.yaml true: say what a resumed run changes, and let a complete run keep what it was made with.

    Raises ConfigError if the settings end before the point that an unfinished run has reached.
    """
    path = directory.config_path
    changes = changed_settings(path.read_text(), settings) if path.exists() else []
    if complete and changes:
        status = read_status(directory.path)
        if status is None or status.state != "done":
            raise ConfigError(
                f"{directory.path} has an unfinished run that is past the end of these settings, which differ from its "
                f"own ({'; '.join(changes)}). Choose another output=DIR, or its own settings."
            )
        print(printable(f"This run was made with other settings, which stand: {'; '.join(changes)}"), flush=True)
    elif changes:
        print(printable(f"Changed since the last start of this run: {'; '.join(changes)}"), flush=True)
    if not complete:
        directory.write_config(settings)


def changed_settings(before: str, now: str) -> list[str]:
    """What differs between two runs' config.yaml, one "key: old -> new" each."""
    old, new = (_leaves(read_yaml(text, where="config.yaml")) for text in (before, now))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _leaves(value: Value, key: str = "") -> dict[str, Value]:
    if not isinstance(value, dict):
        return {key: value}
    leaves: dict[str, Value] = {}
    for name, item in value.items():
        leaves |= _leaves(item, f"{key}.{name}" if key else name)
    return leaves


def check_identity(output: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first fact in which the run in `output` differs from this one."""
    for name, mine in here.items():
        if there.get(name) != mine:
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


def _check_ranks_agree(output: Path, position: int, device: torch.device) -> None:
    positions = gather(torch.tensor([position], device=device)).tolist()
    if len(set(positions)) > 1:
        found = ", ".join("none" if position < 0 else f"one at image {position}" for position in positions)
        raise ConfigError(
            f"The processes found different checkpoints in {output}: {found}. "
            "Put output=DIR on storage that all machines share."
        )

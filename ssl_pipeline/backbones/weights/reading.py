"""The tensors of a weights file by name: safetensors, or a file of torch.save that holds only data."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import is_shortage

HEAD = 64  # bytes that identify another kind of file
OF_THE_TRAINING = ("optim", "scaler", "amp", "lr_sched", "scheduler")  # prefixes of names outside networks


SETTINGS = (argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"))
"""What the official checkpoints of DINO, iBOT, MAE and SimMIM hold besides tensors: settings, read as plain data."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, those of nested tables as `outer.inner`; the state of optimizers is left out.

    Raises ConfigError if the file cannot be read, would run code, or holds no tensor.
    """
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} does not hold tensors by name, but a {type(content).__name__}.")
    tensors = dict(_flat(content, ""))
    if not tensors:
        raise ConfigError(f"{path} does not hold tensors by name: there is no tensor in it.")
    return tensors


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(path: Path) -> object:
    head = _head(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.device("cpu"), torch.serialization.safe_globals(list(SETTINGS)):  # also inside that of another one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers have no common error class, and their messages are about internals
        if is_shortage(error):
            raise
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        other = _other_file(head, kind)
        if other is None and type(error).__name__ == "UnpicklingError":  # torch's advice is to trust the file
            raise ConfigError(
                f"cannot read weights from {path}: it holds more than tensors, or is damaged; pickled objects are not "
                "read. Save only its state dict, preferably as .safetensors."
            ) from None
        damaged = f"it is truncated or damaged, or not a {kind}. Copy it again."
        raise ConfigError(f"cannot read weights from {path}: {other or damaged}") from error


def _head(path: Path) -> bytes:
    """The first bytes of a file; ConfigError for one that is empty, or that cannot be read at all."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        if is_shortage(error):
            raise
        raise ConfigError(f"cannot read weights from {path}: {error.strerror}.") from None
    if not head:
        raise ConfigError(f"cannot read weights from {path}: it is empty (0 bytes). Copy it again.")
    return head


def _other_file(head: bytes, kind: str) -> str | None:
    """What a file of the wrong kind is, by its first bytes."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not weights. Fetch them: git lfs pull."
    if head.lstrip().startswith(b"<"):
        return "it is a web page, not weights. Download the weights again."
    if kind == "safetensors file" and head.startswith(b"PK"):
        return "it is a PyTorch checkpoint. Name it .pt."
    if kind == "PyTorch checkpoint" and head[8:10] == b'{"':
        return "it is a safetensors file. Name it .safetensors."
    return None


def _flat(table: Mapping[object, object], before: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in table.items():
        name = f"{before}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and not str(key).startswith(OF_THE_TRAINING):
            yield from _flat(value, f"{name}.")

"""One checkpoint on disk: a directory of safetensors files with a manifest that vouches for each of them."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import JSON

FORMAT = 1
TENSOR_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used, in one sentence."""


@dataclass(frozen=True)
class SavedState:
    """What one checkpoint holds: tensors (on the CPU) by file stem and name, and the facts saved beside them."""

    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, JSON]
    path: Path

    @property
    def step(self) -> int:
        return whole_number(self.facts, "step")

    @property
    def position(self) -> int:
        return whole_number(self.facts, "position")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` vouches for."""

    files: dict[str, tuple[int, str]]  # file name -> bytes, sha256
    facts: dict[str, JSON]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory (tied weights)."""
    assert TENSOR_FILE.fullmatch(path.name), path.name
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        save_file(copies, path)
    except SafetensorError as error:  # its own class even for a full disk
        raise OSError(f"cannot write {path}: {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    _sync_file(path)


def write_manifest(directory: Path, facts: Mapping[str, JSON]) -> None:
    """Vouch for the files that a directory holds, and for the facts; synced to disk."""
    files: dict[str, JSON] = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(directory.iterdir())}
    body: dict[str, JSON] = {"format": FORMAT, "files": files, "facts": facts}
    path = directory / "manifest.json"
    text = json.dumps({**body, "sha256": _digest(body)}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    _sync_file(path)


def load_checkpoint(path: Path) -> SavedState:
    """All of a checkpoint, verified; CheckpointError if it is damaged."""
    manifest = read_manifest(path)
    verify_files(path, manifest)
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in manifest.files}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not used: {error}.") from None
    return SavedState(tensors=tensors, facts=manifest.facts, path=path)


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint, its own hash and every file name in it checked."""
    try:
        body = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        expected = body.pop("sha256")
        if expected != _digest(body):
            raise CheckpointError(f"{path} is not used: manifest.json is damaged (its sha256 does not fit).")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path} is not used: its format is {body['format']}, needed is {FORMAT}.")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        facts = dict(body["facts"])
    except OSError as error:
        raise CheckpointError(f"{path} is not used: no manifest.json ({error.strerror}).") from None
    except (TypeError, KeyError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not used: manifest.json is not a checkpoint's manifest.") from None
    try:
        whole_number(facts, "position"), whole_number(facts, "step")
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not used: {error}") from None
    for name in files:
        if not TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"{path} is not used: its manifest names {name!r}, not a file of its own.")
    return Manifest(files, facts)


def verify_files(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless each file has the bytes that the manifest vouches for."""
    for name, (size, digest) in manifest.files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{path} is not used: {name} has {found} bytes instead of {size}.")
            if _sha256(path / name) != digest:
                raise CheckpointError(f"{path} is not used: {name} is damaged (its sha256 does not fit).")
        except OSError as error:
            raise CheckpointError(f"{path} is not used: {name}: {error.strerror}.") from None


def whole_number(facts: Mapping[str, JSON], name: str) -> int:
    """A fact that every checkpoint has; CheckpointError if this one has not."""
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"A checkpoint needs the whole number {name!r} among its facts. Got {value!r}.")
    return value


def _digest(body: Mapping[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""One checkpoint on disk: a directory of safetensors files and a manifest with the checksum of each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_pipeline import __version__
from ssl_pipeline.files import is_shortage, sha256_of, sha256_of_json, write_tensors, write_text
from ssl_pipeline.run.state import CheckpointError, RunState

FORMAT = 2
FIRST_VERSION = "0.1.0"  # wrote format 1, which does not say so
TENSOR_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors")


class FormatError(CheckpointError):
    """A whole checkpoint of another format: the run needs another version of this package."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: its tensors (on the CPU) by file stem and name, and the SHA-256 of each file."""

    path: Path
    state: RunState
    tensors: dict[str, dict[str, Tensor]]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    files: dict[str, tuple[int, str]]  # file name -> bytes, sha256
    state: RunState


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory (tied weights)."""
    assert TENSOR_FILE.fullmatch(path.name), path.name
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_tensors(path, copies)


def write_manifest(directory: Path, state: RunState) -> None:
    """Note size and checksum of the files in a directory, and the state of the run; synced to disk."""
    files = {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(directory.iterdir())}
    versions = {"ssl-pipeline": __version__, "torch": torch.__version__}
    body = {"format": FORMAT, "versions": versions, "files": files, "facts": state.to_facts()}
    text = json.dumps({**body, "sha256": sha256_of_json(body)}, indent=2, allow_nan=False)
    write_text(directory / "manifest.json", text + "\n")


def load_checkpoint(path: Path, *, files: Collection[str] | None = None) -> Checkpoint:
    """A checkpoint, verified: all of it, or its manifest and the tensor files of these stems.

    Raises CheckpointError if what is asked for is damaged or missing.
    """
    manifest = read_manifest(path)
    stems = [name.removesuffix(".safetensors") for name in manifest.files] if files is None else files
    names = {stem: f"{stem}.safetensors" for stem in stems}
    verify_files(path, manifest, names.values())
    try:
        tensors = {stem: load_file(path / name) for stem, name in names.items()}
    except (OSError, SafetensorError) as error:
        if is_shortage(error):
            raise
        raise CheckpointError(f"{path} is not used: {error}.") from None
    return Checkpoint(path, manifest.state, tensors, {stem: manifest.files[name][1] for stem, name in names.items()})


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint, its own checksum and every file name in it checked."""
    try:
        body = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        expected = body.pop("sha256")
        if expected != sha256_of_json(body):
            raise CheckpointError(f"{path} is not used: manifest.json is damaged (its sha256 does not fit).")
        _check_format(path, body)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        facts = body["facts"]
    except OSError as error:
        if is_shortage(error):
            raise
        raise CheckpointError(f"{path} is not used: no manifest.json ({error.strerror}).") from None
    except (TypeError, KeyError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not used: manifest.json is not a checkpoint's manifest.") from None
    try:
        state = RunState.from_facts(facts)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not used: {error}") from None
    for name in files:
        if not TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"{path} is not used: its manifest names {name!r}, not a file of its own.")
    return Manifest(files, state)


def verify_files(path: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Raises CheckpointError unless each of the files is there with the bytes that the manifest notes."""
    for name in names:
        if name not in manifest.files:
            raise CheckpointError(f"{path} is not used: it has no {name}.")
        size, digest = manifest.files[name]
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{path} is not used: {name} has {found} bytes instead of {size}.")
            if sha256_of(path / name) != digest:
                raise CheckpointError(f"{path} is not used: {name} is damaged (its sha256 does not fit).")
        except OSError as error:
            if is_shortage(error):
                raise
            raise CheckpointError(f"{path} is not used: {name}: {error.strerror}.") from None


def _check_format(path: Path, body: Mapping[str, JsonValue]) -> None:
    if body["format"] != FORMAT:
        versions = body.get("versions")
        wrote = versions.get("ssl-pipeline") if isinstance(versions, dict) else FIRST_VERSION
        raise FormatError(
            f"{path} has checkpoint format {body['format']} of ssl-pipeline {wrote}, and this is ssl-pipeline "
            f"{__version__} with format {FORMAT}: go on with ssl-pipeline {wrote}, or choose another output=DIR."
        )

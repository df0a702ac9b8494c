"""One checkpoint on disk: a directory of safetensors files and a manifest with the checksum of each of them.

What several processes hold parts of lies in a file for each: `method_part_0_of_2.safetensors` has the rows of the first
process, and what every process holds whole. Parts are put together when they are read, on however many processes.
"""

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
FORMAT_IN_PARTS = 3
FIRST_VERSION = "0.1.0"  # wrote format 1, which does not say so
TENSOR_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors")
PART = re.compile(r"(?P<stem>.+)_part_(?P<number>\d+)_of_(?P<count>\d+)")


class FormatError(CheckpointError):
    """A whole checkpoint of another format: the run needs another version of this package."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: its whole tensors (on the CPU) by file stem and name, and the SHA-256 of each file.

    Where a file is in parts, that is the SHA-256 of those of its parts.
    """

    path: Path
    state: RunState
    tensors: dict[str, dict[str, Tensor]]
    sha256: dict[str, str]


Files = Mapping[str, tuple[int, str]]
"""Bytes and SHA-256 of files, by name."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    files: Files
    state: RunState

    def parts_of(self, stem: str) -> list[str]:
        """The files that `stem` consists of, in the order of the processes; one where it is whole."""
        parts = {int(found["number"]): name for name in self.files if (found := _part(name)) and found["stem"] == stem}
        return [parts[number] for number in sorted(parts)] or [f"{stem}.safetensors"]

    @property
    def stems(self) -> list[str]:
        """What the files are called without their endings, each once."""
        return list(dict.fromkeys(part["stem"] if (part := _part(name)) else Path(name).stem for name in self.files))


def _part(name: str) -> re.Match[str] | None:
    return PART.fullmatch(Path(name).stem)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory (tied weights).

    Returns the file's size and SHA-256.
    """
    assert TENSOR_FILE.fullmatch(path.name), path.name
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_tensors(path, copies)
    return path.stat().st_size, sha256_of(path)


def write_manifest(directory: Path, state: RunState, files: Files) -> None:
    """Note size and checksum of the files in a directory, and the state of the run; synced to disk."""
    versions = {"ssl-pipeline": __version__, "torch": torch.__version__}
    number = FORMAT_IN_PARTS if any(map(_part, files)) else FORMAT
    listed = {name: [size, digest] for name, (size, digest) in sorted(files.items())}
    body = {"format": number, "versions": versions, "files": listed, "facts": state.to_facts()}
    text = json.dumps({**body, "sha256": sha256_of_json(body)}, indent=2, allow_nan=False)
    write_text(directory / "manifest.json", text + "\n")


def load_checkpoint(path: Path, *, files: Collection[str] | None = None) -> Checkpoint:
    """A checkpoint, verified: all of it, or its manifest and the tensor files of these stems.

    Raises CheckpointError if what is asked for is damaged or missing.
    """
    manifest = read_manifest(path)
    names = {stem: manifest.parts_of(stem) for stem in (manifest.stems if files is None else files)}
    verify_files(path, manifest, [name for parts in names.values() for name in parts])
    try:
        tensors = {stem: _together([load_file(path / name) for name in parts]) for stem, parts in names.items()}
    except (OSError, SafetensorError) as error:
        if is_shortage(error):
            raise
        raise CheckpointError(f"{path} is not used: {error}.") from None
    sha256 = {stem: _sha256_of_parts([manifest.files[name][1] for name in parts]) for stem, parts in names.items()}
    return Checkpoint(path, manifest.state, tensors, sha256)


def _together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from the rows of each process; whole tensors are only in the first part."""
    first, *others = parts
    return {
        name: torch.cat([rows, *(part.pop(name) for part in others)]) if others and name in others[0] else rows
        for name, rows in first.items()
    }


def _sha256_of_parts(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else sha256_of_json(digests)


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint, its own checksum and every file name in it checked."""
    try:
        body = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        expected = body.pop("sha256")
        if expected != sha256_of_json(body):
            raise CheckpointError(f"{path} is not used: manifest.json is damaged (its sha256 does not fit).")
        _check_format(path, body)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        _check_parts(path, files)
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
    if body["format"] not in (FORMAT, FORMAT_IN_PARTS):
        versions = body.get("versions")
        wrote = versions.get("ssl-pipeline") if isinstance(versions, dict) else FIRST_VERSION
        raise FormatError(
            f"{path} has checkpoint format {body['format']} of ssl-pipeline {wrote}, and this is ssl-pipeline "
            f"{__version__}, which reads formats {FORMAT} and {FORMAT_IN_PARTS}: go on with ssl-pipeline {wrote}, or "
            "choose another output=DIR."
        )


def _check_parts(path: Path, files: Files) -> None:
    """Raises CheckpointError where one of a file's parts is not in the manifest."""
    for name in files:
        if (part := _part(name)) is not None:
            for number in range(int(part["count"])):
                other = f"{part['stem']}_part_{number}_of_{part['count']}.safetensors"
                if other not in files:
                    raise CheckpointError(f"{path} is not used: it has {name}, but no {other}.")

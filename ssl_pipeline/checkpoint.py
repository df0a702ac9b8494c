"""Checkpoints as safetensors and JSON: complete or not there, verified before use, nothing pickled."""

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pipeline.atomic import JSON, sync_directory
from ssl_pipeline.config import ConfigError

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
        return _integer(self.facts, "step")

    @property
    def position(self) -> int:
        return _integer(self.facts, "position")


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, tuple[int, str]]  # file name -> bytes, sha256
    facts: dict[str, JSON]


class Checkpoints:
    """The checkpoints of one run, one directory `step-00001234` each, ordered by position in the data.

    A directory gets that name only when all of it is on disk, by one rename. `manifest.json` in it holds the
    size and sha256 of every file, the facts, and the sha256 of itself. Only one process may write.
    """

    def __init__(self, directory: Path, *, keep: int = 2, report: Callable[[str], None] = warnings.warn) -> None:
        if keep < 2:
            raise ConfigError(f"A run must keep at least 2 checkpoints, in case one is damaged. Got {keep}.")
        self.directory = directory
        self.keep = keep
        self.report = report
        self._known_valid: set[Path] = set()  # written or verified by this object: not hashed again to prune

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, JSON]) -> Path:
        """Write one checkpoint, then remove those beyond the newest `keep`; if it fails, nothing changes.

        `tensors` has one safetensors file per key. `facts` must hold "position", the images seen so far.
        """
        _integer(facts, "position")
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / f".tmp-{step:08d}-{secrets.token_hex(4)}"
        try:
            unfinished.mkdir()
            for name, entries in tensors.items():
                _write_tensors(unfinished / f"{name}.safetensors", entries)
            _write_manifest(unfinished, {**facts, "step": step})
            sync_directory(unfinished)
            saved = self._publish(unfinished, self.directory / f"step-{step:08d}")
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._known_valid.add(saved)
        self._prune(saved)
        return saved

    def load_latest(self) -> SavedState | None:
        """The newest checkpoint that is whole, None if there is none at all.

        Each damaged one is reported and left where it is. Raises CheckpointError if all are damaged.
        """
        candidates = self._newest_first()
        reason = ""
        for path in candidates:
            try:
                state = _load(path)
            except CheckpointError as error:
                reason = str(error)
                self.report(f"{reason} Trying the one before it.")
                continue
            self._known_valid.add(path)
            return state
        if candidates:
            raise CheckpointError(
                f"None of the {len(candidates)} checkpoints in {self.directory} can be used, and a run never "
                f"starts again from zero over them: {reason} Restore one, or choose another output=DIR."
            )
        return None

    def _publish(self, unfinished: Path, final: Path) -> Path:
        """Give a finished directory its name; one that had the name stays a checkpoint until it is pruned."""
        if final.exists():  # steps are renumbered when the batch size changes at resume
            older = final.with_name(f"{final.name}-replaced-{secrets.token_hex(4)}")
            final.rename(older)
            if final in self._known_valid:
                self._known_valid.remove(final)
                self._known_valid.add(older)
        unfinished.rename(final)
        sync_directory(self.directory)
        return final

    def _newest_first(self) -> list[Path]:
        """Every checkpoint by position, step and name; the unreadable ones first, so that they are reported."""

        def age(path: Path) -> tuple[int, float, float, bool]:
            try:
                facts = _read_manifest(path).facts
                return (0, -_integer(facts, "position"), -_integer(facts, "step"), "replaced" in path.name)
            except CheckpointError:
                return (-1, 0, 0, False)

        if not self.directory.is_dir():
            return []
        return sorted(sorted(self.directory.glob("step-*")), key=age)

    def _prune(self, saved: Path) -> None:
        """Remove what the newest `keep` valid checkpoints make superfluous; a damaged one is left to its owner."""
        kept: set[int] = set()
        for path in self._newest_first():
            replaced = "replaced" in path.name
            if not self._is_valid(path):
                if replaced:
                    self._remove(path)
                continue
            position = _integer(_read_manifest(path).facts, "position")
            if path != saved and (len(kept) >= self.keep or position in kept):
                self._remove(path)
            else:
                kept.add(position)
        for leftover in self.directory.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _is_valid(self, path: Path) -> bool:
        if path not in self._known_valid:
            try:
                _verify(path, _read_manifest(path))
            except CheckpointError:
                return False
            self._known_valid.add(path)
        return True

    def _remove(self, path: Path) -> None:
        """Take the name away first: a removal that is cut short leaves no half checkpoint."""
        path.rename(path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}"))
        self._known_valid.discard(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "INDEX.name" -> tensor, INDEX counting the parameters through all groups.

    Parameters without state yet have no entry. A Python number becomes a float64 tensor, and stays one.
    """
    tensors = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD's momentum buffer before its first use
                continue
            if isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.float64)
            assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps a {type(value)} in {name!r}"
            tensors[f"{index}.{name}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's state by what `optimizer_tensors` gave; hyper-parameters stay as they are.

    Every tensor goes to its parameter's device and memory layout, but `step`, which torch keeps on the CPU
    unless the group is fused or capturable. Raises CheckpointError, with nothing changed, where an entry does
    not fit the parameters.
    """
    slots = [
        (parameter, bool(group.get("fused") or group.get("capturable")))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdigit() and name) or int(index) >= len(slots):
            raise CheckpointError(
                f"The saved optimizer state has an entry {key!r}; the optimizer has parameters "
                f"0 to {len(slots) - 1}. The model or its parameter groups have changed since."
            )
        parameter, step_on_device = slots[int(index)]
        if value.ndim > 0 and value.shape != parameter.shape:
            raise CheckpointError(
                f"The saved optimizer state {key!r} has shape {tuple(value.shape)}; its parameter has "
                f"{tuple(parameter.shape)}. The model or its parameter groups have changed since."
            )
        device = parameter.device if name != "step" or step_on_device else torch.device("cpu")
        like = parameter if value.shape == parameter.shape else value
        placed = torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False)
        state.setdefault(parameter, {})[name] = placed.copy_(value)
    optimizer.state.clear()
    optimizer.state.update(state)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
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


def _write_manifest(directory: Path, facts: Mapping[str, JSON]) -> None:
    files: dict[str, JSON] = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(directory.iterdir())}
    body: dict[str, JSON] = {"format": FORMAT, "files": files, "facts": facts}
    path = directory / "manifest.json"
    text = json.dumps({**body, "sha256": _digest(body)}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    _sync_file(path)


def _load(path: Path) -> SavedState:
    manifest = _read_manifest(path)
    _verify(path, manifest)
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in manifest.files}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not used: {error}.") from None
    return SavedState(tensors=tensors, facts=manifest.facts, path=path)


def _read_manifest(path: Path) -> _Manifest:
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
        _integer(facts, "position"), _integer(facts, "step")
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not used: {error}") from None
    for name in files:
        if not TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"{path} is not used: its manifest names {name!r}, not a file of its own.")
    return _Manifest(files, facts)


def _verify(path: Path, manifest: _Manifest) -> None:
    for name, (size, digest) in manifest.files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{path} is not used: {name} has {found} bytes instead of {size}.")
            if _sha256(path / name) != digest:
                raise CheckpointError(f"{path} is not used: {name} is damaged (its sha256 does not fit).")
        except OSError as error:
            raise CheckpointError(f"{path} is not used: {name}: {error.strerror}.") from None


def _integer(facts: Mapping[str, JSON], name: str) -> int:
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

"""The checkpoints of a run: complete or not there, verified before use, the newest that is whole, the oldest pruned."""

from __future__ import annotations

import secrets
import shutil
import struct
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import failing_together, gather, rank, world_size
from ssl_pipeline.files import sync
from ssl_pipeline.run.checkpoint_files import (
    Checkpoint,
    Files,
    FormatError,
    Manifest,
    load_checkpoint,
    read_manifest,
    verify_files,
    write_manifest,
    write_tensor_file,
)
from ssl_pipeline.run.state import CheckpointError, RunState


class Checkpoints:
    """The checkpoints of one run, one directory `step-00001234` each, ordered by position in the data.

    A directory gets that name only when all of it is on disk, by one rename. `manifest.json` in it holds the
    size and sha256 of every file, the RunState, and the sha256 of itself. Only one process may write, or those of one
    run together; others may read meanwhile.
    """

    def __init__(self, directory: Path, *, keep: int = 2, report: Callable[[str], None] = warnings.warn) -> None:
        if keep < 2:
            raise ConfigError(f"A run must keep at least 2 checkpoints, in case one is damaged. Got {keep}.")
        self.directory = directory
        self.keep = keep
        self.report = report
        self._known_valid: set[Path] = set()  # written or verified by this object: not hashed again to prune

    def save(self, state: RunState, tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write one checkpoint, then remove those beyond the newest `keep`; if it fails, nothing changes.

        `tensors` has one safetensors file per key.
        """
        unfinished = self._unfinished(state, secrets.randbits(32))
        try:
            unfinished.mkdir(parents=True)
            files = _write(unfinished, tensors)
            return self._finish(unfinished, state, files)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def save_parts(
        self, state: RunState, parts: Mapping[str, Mapping[str, Tensor]], *, device: torch.device | str
    ) -> None:
        """Write one checkpoint together: all processes call it, each with its rows, the first with the rest too.

        Each writes and hashes files of its own; the first one writes the manifest and names the directory when all of
        them are on disk. An error on one is raised on all, and then nothing has changed. device: that of collectives.
        """
        token = int(gather(torch.tensor([secrets.randbits(32)], device=device))[0])  # the first one's
        unfinished = self._unfinished(state, token)
        try:
            with failing_together(device):
                if rank() == 0:
                    unfinished.mkdir(parents=True)
            with failing_together(device):
                if not unfinished.is_dir():
                    raise CheckpointError(
                        f"{unfinished} of the first process is not there. Put output=DIR on storage that all machines "
                        "share."
                    )
                own = _write(unfinished, {f"{name}_part_{rank()}_of_{world_size()}": of for name, of in parts.items()})
            files = _of_all_processes(own, device)
            with failing_together(device):
                if rank() == 0:
                    self._finish(unfinished, state, files)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _unfinished(self, state: RunState, token: int) -> Path:
        return self.directory / f".tmp-{state.step:08d}-{token:08x}"

    def _finish(self, unfinished: Path, state: RunState, files: Files) -> Path:
        """Make a directory with all files the newest checkpoint."""
        write_manifest(unfinished, state, files)
        saved = self._publish(unfinished, self._path_of(state.step))
        self._known_valid.add(saved)
        self._prune(saved)
        return saved

    def load_latest(self, *, files: Collection[str] | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole, None if there is none at all; of all its files, or of these stems.

        Each damaged one is reported and left where it is. Raises CheckpointError if all are damaged, or if one has
        another format.
        """
        candidates = self._newest_first()
        reason = ""
        for path in candidates:
            try:
                checkpoint = load_checkpoint(path, files=files)
            except FormatError:
                raise
            except CheckpointError as error:
                reason = str(error)
                self.report(f"{reason} Trying the one before it.")
                continue
            if files is None:
                self._known_valid.add(path)
            return checkpoint
        if candidates:
            raise CheckpointError(
                f"None of the {len(candidates)} checkpoints in {self.directory} can be used, and a run never "
                f"starts again from zero over them: {reason} Restore one, or choose another output=DIR."
            )
        return None

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint by only the manifests, which do not show damage; None if none can be read."""
        for path in self._newest_first():
            with suppress(CheckpointError):
                return path, read_manifest(path)
        return None

    def load_step(self, step: int, *, files: Collection[str] | None = None) -> Checkpoint:
        """The checkpoint after `step` optimizer steps; CheckpointError if it is not there or is damaged."""
        path = self._path_of(step)
        if not path.is_dir():
            steps = sorted({int(found.name.split("-")[1]) for found in self.directory.glob("step-*")})
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}. It has {', '.join(map(str, steps)) or 'none'}."
            )
        return load_checkpoint(path, files=files)

    def _path_of(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _publish(self, unfinished: Path, final: Path) -> Path:
        """Give a finished directory its name; one that had the name stays a checkpoint until it is pruned."""
        if final.exists():  # steps are renumbered when the batch size changes at resume
            older = final.with_name(f"{final.name}-replaced-{secrets.token_hex(4)}")
            final.rename(older)
            if final in self._known_valid:
                self._known_valid.remove(final)
                self._known_valid.add(older)
        unfinished.rename(final)
        sync(self.directory)
        return final

    def _newest_first(self) -> list[Path]:
        """Every checkpoint by position, step and name; the unreadable ones first, so that they are reported."""

        def age(path: Path) -> tuple[int, float, float, bool]:
            try:
                state = read_manifest(path).state
                return (0, -state.position, -state.step, "replaced" in path.name)
            except CheckpointError:
                return (-1, 0, 0, False)

        if not self.directory.is_dir():
            return []
        return sorted(sorted(self.directory.glob("step-*")), key=age)

    def _prune(self, saved: Path) -> None:
        """Remove what the newest `keep` valid checkpoints make superfluous; a damaged one is left to the user."""
        kept: set[int] = set()
        for path in self._newest_first():
            replaced = "replaced" in path.name
            if not self._is_valid(path):
                if replaced:
                    self._remove(path)
                continue
            position = read_manifest(path).state.position
            if path != saved and (len(kept) >= self.keep or position in kept):
                self._remove(path)
            else:
                kept.add(position)
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what a process left that was killed while it wrote or removed a checkpoint; for the run's owner."""
        for leftover in self.directory.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _is_valid(self, path: Path) -> bool:
        if path not in self._known_valid:
            try:
                manifest = read_manifest(path)
                verify_files(path, manifest, manifest.files)
            except CheckpointError:
                return False
            self._known_valid.add(path)
        return True

    def _remove(self, path: Path) -> None:
        """Take the name away first: a removal that is cut short leaves no half checkpoint."""
        path.rename(path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}"))
        self._known_valid.discard(path)


def _write(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Files:
    names = {name: f"{name}.safetensors" for name in tensors}
    return {names[name]: write_tensor_file(directory / names[name], of) for name, of in tensors.items()}


def _of_all_processes(own: Files, device: torch.device | str) -> Files:
    """The files of every process, from those of this one; the names differ only in the number of the process."""
    facts = [[size, *struct.unpack("<4q", bytes.fromhex(digest))] for size, digest in own.values()]
    all_WF5 = gather(torch.tensor([facts], device=device)).tolist()
    mine = f"_part_{rank()}_"
    return {
        name.replace(mine, f"_part_{number}_"): (size, struct.pack("<4q", *digest).hex())
        for number, facts_F5 in enumerate(all_WF5)
        for name, (size, *digest) in zip(own, facts_F5, strict=True)
    }

"""The checkpoints of a run: complete or not there, verified before use, the newest that is whole, the oldest pruned."""

import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import JSON, sync
from ssl_pipeline.run.checkpoint_files import (
    CheckpointError,
    SavedState,
    load_checkpoint,
    read_manifest,
    verify_files,
    whole_number,
    write_manifest,
    write_tensors,
)


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
        whole_number(facts, "position")
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / f".tmp-{step:08d}-{secrets.token_hex(4)}"
        try:
            unfinished.mkdir()
            for name, entries in tensors.items():
                write_tensors(unfinished / f"{name}.safetensors", entries)
            write_manifest(unfinished, {**facts, "step": step})
            sync(unfinished)
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
                state = load_checkpoint(path)
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
        sync(self.directory)
        return final

    def _newest_first(self) -> list[Path]:
        """Every checkpoint by position, step and name; the unreadable ones first, so that they are reported."""

        def age(path: Path) -> tuple[int, float, float, bool]:
            try:
                facts = read_manifest(path).facts
                return (0, -whole_number(facts, "position"), -whole_number(facts, "step"), "replaced" in path.name)
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
            position = whole_number(read_manifest(path).facts, "position")
            if path != saved and (len(kept) >= self.keep or position in kept):
                self._remove(path)
            else:
                kept.add(position)
        for leftover in self.directory.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _is_valid(self, path: Path) -> bool:
        if path not in self._known_valid:
            try:
                verify_files(path, read_manifest(path))
            except CheckpointError:
                return False
            self._known_valid.add(path)
        return True

    def _remove(self, path: Path) -> None:
        """Take the name away first: a removal that is cut short leaves no half checkpoint."""
        path.rename(path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}"))
        self._known_valid.discard(path)

"""What ends a run from outside its own code, explained by its settings: a lost process, no memory, a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.backbones import BackboneConfig
from ssl_pipeline.config import RunError, is_out_of_memory, memory_asked_for, without_number
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.distributed import peer_failure
from ssl_pipeline.training.determinism import explain_nondeterminism
from ssl_pipeline.training.run import Run, TrainConfig

NO_ROOM = {  # what is said, and what to do
    errno.ENOSPC: ("The disk of the run {} is full", "free some space"),
    errno.EDQUOT: ("The quota of the disk of the run {} is used up", "free some space"),
    errno.EFBIG: ("The run {} may not write files as large as it needs", "allow larger ones (ulimit -f unlimited)"),
}


@dataclass(frozen=True)
class Failures:
    """Explains errors of the run with these settings."""

    output: Path
    data: DataConfig
    train: TrainConfig
    backbone: BackboneConfig

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what is raised inside the block in the words of `explain`."""
        try:
            yield
        except Exception as error:
            raise self.explain(error) from None

    def explain(self, error: Exception) -> Exception:
        """A RunError for what has a cause that settings or an operator can fix; the same error for everything else."""
        lost = peer_failure(error)
        if lost is not None:
            return lost
        if (told := explain_nondeterminism(error)) is not None:
            return told
        if is_out_of_memory(error):
            return RunError(self._out_of_memory(error))
        if isinstance(error, OSError):
            for number in NO_ROOM:  # a library may drop the number
                if error.errno == number or os.strerror(number) in str(error):
                    return RunError(self._no_room(error, *NO_ROOM[number]))
        return error

    def _out_of_memory(self, error: Exception) -> str:
        ways = [f"a smaller data.batch_size than {self.data.batch_size} (train.accumulate keeps the global batch)"]
        ways += ["train.precision=bf16 instead of no"] if self.train.precision == "no" else []
        ways += [] if self.backbone.checkpoint_activations else ["backbone.checkpoint_activations=true (a ViT's)"]
        used = f"train.precision={self.train.precision}, backbone.checkpoint_activations="
        used += str(self.backbone.checkpoint_activations).lower()
        return f"Out of memory{memory_asked_for(error)} with {used}. Try {', or '.join(ways)}."

    def _no_room(self, error: OSError, told: str, to_do: str) -> str:
        whole = max((path.name for path in (self.output / "checkpoints").glob("step-????????")), default=None)
        last = f"Its last complete checkpoint is {whole}" if whole else "It has no checkpoint yet"
        return (
            f"{told.format(self.output)} ({without_number(error)}). {last}; {to_do} and run the same command again to "
            "go on from there."
        )


def failures_of(run: Run) -> Failures:
    """Those of a run that is put together."""
    return Failures(run.output.path, run.data, run.train, run.method.backbone.config)

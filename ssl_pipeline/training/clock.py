"""From the position in the stream to the progress of the run, and to the optimizer steps that it has made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssl_pipeline.schedule import Duration, Progress


@dataclass(frozen=True)
class Clock:
    """Translates the position in the stream into progress.

    num_samples: images per epoch. global_batch: images per optimizer step from now on. end: the position at the end.
    begun, steps_begun: position and optimizer steps of the run at its present start; earlier steps may have been of
    another size. labelled_batch, labelled_begun: the same for the stream of labelled images, if there is one.

    Schedules go only by the position: their steps are those of a run that had the present batch from the beginning.
    """

    num_samples: int
    global_batch: int
    end: int
    begun: int = 0
    steps_begun: int = 0
    labelled_batch: int = 0
    labelled_begun: int = 0

    def progress(self, position: int) -> Progress:
        return Progress(
            step=position // self.global_batch,
            total_steps=math.ceil(self.end / self.global_batch),
            steps_per_epoch=self.num_samples / self.global_batch,
        )

    def epoch(self, position: int) -> float:
        """Passes over the data up to `position`."""
        return position / self.num_samples

    def steps_made(self, position: int) -> int:
        """Optimizer steps that the run has really made up to `position`, over all its starts."""
        return self.steps_begun + (position - self.begun) // self.global_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the run will have made at its end."""
        return self.steps_begun + math.ceil((self.end - self.begun) / self.global_batch)

    def position_after(self, steps: int) -> int:
        """The position after this many optimizer steps of the run, none of them before its present start."""
        return self.begun + (steps - self.steps_begun) * self.global_batch

    def labelled_position(self, position: int) -> int:
        """Where the stream of labelled images is at `position`."""
        return self.labelled_begun + (position - self.begun) // self.global_batch * self.labelled_batch

    def is_due(self, every: Duration, position: int) -> bool:
        """Whether what happens `every` so often happens after the step that ends at `position`; 0: never."""
        if every.is_zero:
            return False
        done = self.progress(position)
        return done.step % max(every.steps(done), 1) == 0

    def is_last(self, position: int) -> bool:
        """Whether the run ends at `position`."""
        return position >= self.end

"""From the position in the stream to the progress of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssl_pipeline.schedule import Duration, Progress


@dataclass(frozen=True)
class Clock:
    """Translates the position in the stream into progress."""

    num_samples: int
    global_batch: int
    end: int

    def progress(self, position: int) -> Progress:
        return Progress(
            step=position // self.global_batch,
            total_steps=math.ceil(self.end / self.global_batch),
            steps_per_epoch=self.num_samples / self.global_batch,
        )

    def is_due(self, every: Duration, position: int) -> bool:
        """Whether what happens `every` so often happens after the step that ends at `position`; 0: never."""
        if every.is_zero:
            return False
        done = self.progress(position)
        return done.step % max(every.steps(done), 1) == 0

    def is_last(self, position: int) -> bool:
        """Whether the run ends at `position`."""
        return position >= self.end

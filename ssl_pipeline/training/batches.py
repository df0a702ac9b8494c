"""The micro-batches of a run, from a position to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.labelled import open_labelled_stream, with_labelled
from ssl_pipeline.data.stream import open_stream
from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.methods.base import Method
from ssl_pipeline.training.run import Run


def open_batches(run: Run, position: int, keepalive: Callable[[], None]) -> Iterator[StreamBatch]:
    """This rank's share of each micro-batch, with its labelled images if the method reads some."""
    groups, masks = read_groups(run.method, run.augment, labelled=False)
    beside = run.data.labelled.batch_size if run.data.labelled is not None and run.labelled_index is not None else 0
    share = run.data.batch_size / (run.data.batch_size + beside)
    stream = open_stream(
        run.index,
        groups,
        run.data,
        masks=masks,
        seed=run.seed,
        position=position,
        rank=rank(),
        world_size=world_size(),
        accumulate=run.train.accumulate,
        batches=math.ceil((run.clock.end - position) / run.clock.global_batch) * run.train.accumulate,
        device=run.accelerator.device,
        keepalive=keepalive,
        memory_share=share,
    )
    if run.labelled_index is None:
        return stream
    groups, masks = read_groups(run.method, run.augment, labelled=True)
    labelled = open_labelled_stream(
        run.labelled_index,
        groups,
        run.data,
        masks=masks,
        seed=run.seed,
        step=run.clock.progress(position).step,
        position=run.clock.labelled_position(position),
        rank=rank(),
        world_size=world_size(),
        accumulate=run.train.accumulate,
        device=run.accelerator.device,
        keepalive=keepalive,
        memory_share=1 - share,
    )
    return with_labelled(stream, labelled)


def read_groups(
    method: Method, augment: Mapping[str, ViewGroup], *, labelled: bool
) -> tuple[dict[str, ViewGroup], dict[str, MaskRule]]:
    """The groups of views that the method reads of the labelled or of the other images, and their masks."""
    needs = [needed for needed in method.needs if needed.labelled == labelled and needed.name in augment]
    groups = {needed.name: augment[needed.name] for needed in needs}
    return groups, {needed.name: needed.mask for needed in needs if needed.mask is not None}


def announced(stream: Iterator[StreamBatch], run: Run, message: Callable[[str], None]) -> Iterator[StreamBatch]:
    """The stream; says how long its first batch took."""
    asked = time.perf_counter()
    first = next(stream)
    now = time.perf_counter()
    message(
        f"First batch {now - run.start.began:.1f} s after the start: "
        f"{run.start.index_seconds:.1f} s for the index, {now - asked:.1f} s for the batch itself."
    )
    yield first
    del first  # its memory is the stream's
    yield from stream

"""Whether the accelerator waits for its images, and which setting helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.remote import is_url
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.machine import cores_per_process, free_bytes
from ssl_pipeline.run.doctor.optimization import WAITING

ENOUGH = 0.05  # of the time spent waiting: the loader no longer is the bottleneck; in between, the last message holds
STEPS_TO_JUDGE = 10  # one slow batch is not a bottleneck
LARGE_IMAGE = 80_000  # bytes; ImageNet's have 110,000, packed ones 42,000
SMALL = 0.25  # of the free memory: a set that can stay decoded on the device


class LoaderWatch:
    """Finds the sentence to say when the loader becomes the bottleneck, and when it no longer is.

    The first interval that it is shown is left out: in it the workers start. `advise` is asked when it is needed.
    """

    def __init__(self, advise: Callable[[], str]) -> None:
        self._advise = advise
        self._is_warm = self._is_slow = False
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def observe(self, *, steps: int, seconds: float, data_wait: float) -> str | None:
        """Take in an interval; `data_wait` is the share of its time that was spent waiting for images."""
        if not self._is_warm:
            self._is_warm = True
            return None
        self._steps += steps
        self._seconds += seconds
        self._waited += data_wait * seconds
        if self._steps < STEPS_TO_JUDGE or not self._seconds:
            return None
        share, of_steps = self._waited / self._seconds, f"of the last {self._steps} steps' time"
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if share > WAITING and not self._is_slow:
            self._is_slow = True
            return (
                f"The loader is the bottleneck: {share:.0%} {of_steps} was spent waiting for images. {self._advise()}"
            )
        if share < ENOUGH and self._is_slow:
            self._is_slow = False
            return f"The loader keeps up now: {share:.0%} {of_steps} was spent waiting for images."
        return None


@dataclass(frozen=True)
class Supply:
    """What images come from.

    cores: CPU cores of one training process.
    stored_bytes: mean size of a stored image; decoded_bytes: size of all images, decoded.
    free_bytes: memory that one training process may still take on its device.
    """

    cores: float
    is_remote: bool
    stored_bytes: float
    decoded_bytes: int
    free_bytes: int


def supply_of(index: ShardIndex, device: torch.device) -> Supply:
    """What there is in this process."""
    return Supply(
        cores=cores_per_process(),
        is_remote=is_url(index.source),
        stored_bytes=index.image_bytes / len(index),
        decoded_bytes=int(index.shard_pixel_bytes.sum()),
        free_bytes=free_bytes(device) or 0,
    )


def loader_advice(data: DataConfig, supply: Supply, device: torch.device) -> str:
    """Which settings make the images of a run on `device` come faster, those first that change least."""
    if data.cache:
        return "The images are decoded already (data.cache); what is left is drawing their views, which takes one core."
    helps = []
    workers = int(supply.cores) - 1  # the training process has work of its own
    if workers > data.workers:
        helps.append(
            f"data.workers={workers} ({supply.cores:g} cores per training process, {data.workers} workers now)"
        )
    if device.type == "cuda" and not data.crops_on_device(device):
        helps.append("data.crop_on=device (workers only decode)")
    if 0 < supply.decoded_bytes < SMALL * supply.free_bytes:
        helps.append(f"data.cache=true (all images take {supply.decoded_bytes / 1e9:.2g} GB decoded)")
    if supply.stored_bytes > LARGE_IMAGE:
        helps.append(
            "shards packed by data_tools.make_shards with short_side=320 quality=90, about twice as fast to decode "
            f"(an image takes {supply.stored_bytes / 1000:.0f} kB now)"
        )
    if supply.is_remote:
        helps.append(f"data.prefetch={4 * data.prefetch} (remote shards come unevenly)")
    if not helps:
        return f"All {supply.cores:g} cores of this training process are in use; more of them would help."
    return f"What helps: {'; '.join(helps)}."

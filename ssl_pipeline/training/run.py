"""What a training run consists of, and how long it lasts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import nn

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.distributed import world_size
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training.clock import Clock


class TrainConfig(Config):
    """How long and how the method is trained."""

    one_of = ("epochs", "steps")

    epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the data; or set steps. On the command line either replaces the recipe's length."""
    steps: int | None = Field(None, gt=0, le=10**9)
    """Optimizer steps; or set epochs."""
    precision: Literal["bf16", "fp16", "no"] = "no"
    """Mixed precision of forward and backward; weights, losses and averages stay float32."""
    accumulate: int = Field(1, ge=1, le=2**20)
    """Micro-batches per optimizer step: the global batch is batch_size * processes * this."""
    sync_batch_norm: bool = False
    """Whether batch norm sees the images of all processes."""
    compile: bool = False
    """Whether backbones (and MAE's decoder) go through torch.compile."""
    save_every: Duration = Duration("1ep")
    """Time between checkpoints; 0: none on the way. One is written at the end in any case."""
    keep_checkpoints: int = Field(2, ge=2)
    """Newest checkpoints that are kept."""
    log_every: int = Field(50, ge=0)
    """Steps between logged rows; 0: none on the way. The first and the last step have one in any case."""
    time_steps: int = Field(0, ge=0)
    """Steps between those whose parts (wait, copy, ..., optimizer) are timed, for metrics.jsonl; 0: none."""
    profile: int = Field(0, ge=0, le=1000)
    """How many steps, after the first five, go into a trace of torch's profiler, in output/profile; 0: no trace."""
    hang_timeout: float = Field(600.0, ge=0, le=1e9)
    """Seconds without a finished step, or without any activity at the start, after which the process prints where it
    stands and ends with status failed; 0 never times out."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            got = "both" if self.epochs is not None else "neither"
            raise ValueError(f"set either epochs or steps. Got {got}.")
        return self


class Monitor(Protocol):
    """Something measured on the backbone from time to time; all ranks call it, rank 0's result is logged."""

    @property
    def every(self) -> Duration: ...

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]: ...


def start_clock(index: ShardIndex, data: DataConfig, config: TrainConfig) -> Clock:
    """The clock of a run; raises ConfigError if the global batch is larger than the data set."""
    global_batch = data.batch_size * world_size() * config.accumulate
    if global_batch > len(index):
        raise ConfigError(
            f"The global batch is larger than the data set: {data.batch_size} per process * {world_size()} processes "
            f"* {config.accumulate} accumulated = {global_batch}, but {data.shards} has {len(index)} images. "
            "Lower data.batch_size."
        )
    if config.steps is not None:
        end = config.steps * global_batch
    else:
        assert config.epochs is not None
        end = math.ceil(config.epochs * len(index))
    return Clock(len(index), global_batch, end)


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it writes about itself."""

    path: Path
    directory: RunDirectory | None
    """Rank 0 alone has it."""
    settings: str = ""
    """YAML for config.yaml, written once it is clear that the run in `path` may be continued."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What a checkpoint must share with this run to be continued."""
    wandb: bool = False


@dataclass(frozen=True)
class Start:
    """When the command began, by `time.perf_counter`, and how many seconds of the start the shards took."""

    began: float = field(default_factory=time.perf_counter)
    index_seconds: float = 0.0


@dataclass
class Run:
    """Everything a training run consists of; `pretrain.py` puts it together."""

    method: Method
    preprocessing: Preprocessing
    """Of the images with which its backbones are evaluated."""
    clock: Clock
    index: ShardIndex
    labelled_index: ShardIndex | None
    """For methods with labelled views."""
    augment: Mapping[str, ViewGroup]
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    seed: int
    accelerator: Accelerator
    output: Output
    monitors: Sequence[Monitor] = ()
    start: Start = field(default_factory=Start)

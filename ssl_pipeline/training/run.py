"""What a training run consists of, and how long it lasts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from accelerate import Accelerator
from pydantic import Field, JsonValue, model_validator
from torch import nn

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import Backbone, Preprocessing
from ssl_pipeline.config import Config, ConfigError, MayChange
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.distributed import world_size
from ssl_pipeline.files import JSON
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.run.state import RunState
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training.clock import Clock
from ssl_pipeline.training.sharding import Sharding


class TrainConfig(Config):
    """How long and how the method is trained."""

    one_of = ("epochs", "steps")

    epochs: MayChange[float | None] = Field(None, gt=0, le=1e6)
    """Passes over the data; or set steps. On the command line either replaces the recipe's length."""
    steps: MayChange[int | None] = Field(None, gt=0, le=10**9)
    """Optimizer steps; or set epochs."""
    precision: MayChange[Literal["bf16", "fp16", "no"]] = "no"
    """Mixed precision of forward and backward; weights, losses and averages stay float32."""
    accumulate: MayChange[int] = Field(1, ge=1, le=2**20)
    """Micro-batches per optimizer step: the global batch is batch_size * processes * this."""
    sync_batch_norm: MayChange[bool] = False
    """Whether batch norm sees the images of all processes."""
    parallel: MayChange[Literal["ddp", "fsdp"]] = "ddp"
    """What each of several processes holds: all weights (`ddp`), or a share of weights, gradients and the optimizer's
    state (`fsdp`, for ViTs that are too large for that)."""
    compile: MayChange[bool | Literal["auto"]] = False
    """Whether backbones (and MAE's decoder) go through torch.compile. auto: on a GPU, where that works, in runs of
    5,000 steps or more. The colours of a batch are compiled as with auto, whatever stands here."""
    copy_stream: MayChange[bool] = False
    """Whether batches are copied to a GPU in their own CUDA stream, during the step before."""
    save_every: MayChange[Duration] = Duration("1ep")
    """Time between checkpoints; 0: none during the run. One is written at the end in any case."""
    keep_checkpoints: MayChange[int] = Field(2, ge=2)
    """Newest checkpoints that are kept."""
    log_every: MayChange[int] = Field(50, ge=0)
    """Steps between logged rows; 0: none during the run. The first and the last step have one in any case."""
    gradient_norms: MayChange[bool] = False
    """Whether rows have the gradient norms of each layer of the backbones and of each other part, before they are
    clipped, as `gradient_norm/student.backbone.layer03` and `gradient_norm/student.head`."""
    time_steps: MayChange[int] = Field(0, ge=0)
    """Steps between those whose parts (wait, copy, ..., optimizer) are timed, for metrics.jsonl; 0: none."""
    profile: MayChange[int] = Field(0, ge=0, le=1000)
    """How many steps, after the first five, go into a trace of torch's profiler, in output/profile; 0: no trace."""
    on_nan: MayChange[Literal["stop", "skip"]] = "stop"
    """What becomes of a step whose loss or gradient is not finite: `stop` ends the run, `skip` leaves it out:
    its images are skipped, and everything else stays as it was. On a GPU each step then waits for its check."""
    nan_budget: MayChange[int] = Field(10, ge=1, le=10**6)
    """How many steps on_nan=skip leaves out in the whole run; one more ends it."""
    deterministic: MayChange[bool] = False
    """Whether torch's deterministic algorithms are used: the same bits again on the same GPU, at some cost in speed."""
    check_ranks: MayChange[int] = Field(1000, ge=0)
    """Steps between checks that all processes hold the same weights; 0: none."""
    hang_timeout: MayChange[float] = Field(600.0, ge=0, le=1e9)
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


def checked_batch(num_images: int, data: DataConfig, config: TrainConfig, *, num_processes: int, called: str) -> int:
    """The global batch; ConfigError if there are fewer images, which are `called` so."""
    global_batch = data.batch_size * num_processes * config.accumulate
    if global_batch > num_images:
        raise ConfigError(
            f"The global batch is larger than the data set: {data.batch_size} per process * {num_processes} processes "
            f"* {config.accumulate} accumulated = {global_batch}, but {called} has {num_images} images. "
            "Lower data.batch_size."
        )
    return global_batch


def start_clock(index: ShardIndex, data: DataConfig, config: TrainConfig) -> Clock:
    """The clock of a run; raises ConfigError if the global batch is larger than the data set."""
    global_batch = checked_batch(len(index), data, config, num_processes=world_size(), called=display_name(data.shards))
    if config.steps is not None:
        end = config.steps * global_batch
    else:
        assert config.epochs is not None
        end = math.ceil(config.epochs * len(index))
    labelled = data.labelled.batch_size * world_size() * config.accumulate if data.labelled is not None else 0
    return Clock(len(index), global_batch, end, labelled_batch=labelled)


def resumed_clock(clock: Clock, config: TrainConfig, saved: RunState) -> Clock:
    """The clock of a run that goes on from a checkpoint, maybe with another batch.

    `train.epochs` ends where it would have ended in any case; `train.steps` after that many steps really made.
    """
    end = clock.end
    if config.steps is not None:
        end = saved.position + (config.steps - saved.step) * clock.global_batch
    labelled = saved.labelled_position
    if labelled is None:  # of ssl-pipeline 0.2.0, where it followed from the position
        labelled = clock.progress(saved.position).step * clock.labelled_batch
    return replace(clock, end=end, begun=saved.position, steps_begun=saved.step, labelled_begun=labelled)


def learnt_images(method: Method, index: ShardIndex, labelled: ShardIndex | None) -> ShardIndex | None:
    """The images whose labels the method learns: the labelled set, all images, or None if it learns no labels."""
    if labelled is not None:
        return labelled
    return index if any(needed.with_labels for needed in method.needs) else None


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it writes about itself."""

    path: Path
    directory: RunDirectory | None
    """Only rank 0 has it."""
    settings: Config | None = None
    """All of the command's, for config.yaml; a run there is continued if only what may change differs."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What a checkpoint must share with this run besides them to be continued."""
    wandb: bool = False
    about: Mapping[str, JSON] = field(default_factory=dict)
    """What run.json says about this start."""
    saved: Callable[[], None] = lambda: None
    """Called on rank 0 after each checkpoint; it neither takes long nor raises."""

    def plain_settings(self) -> dict[str, JsonValue] | None:
        """The settings for the manifest of a checkpoint."""
        return self.settings.model_dump(mode="json") if self.settings is not None else None


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
    sharding: Sharding | None = None
    """Set when the method is sharded."""

    def whole_backbone(self) -> Backbone:
        """The evaluated backbone, all of it on this process; all processes call it together."""
        return self.method.backbone if self.sharding is None else self.sharding.backbone()

    def whole_classifier(self) -> nn.Linear | None:
        """The same of the method's classifier, None if it has none."""
        return self.method.classifier if self.sharding is None else self.sharding.classifier()

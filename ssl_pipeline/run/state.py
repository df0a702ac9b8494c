"""What a checkpoint says about its run besides the tensors: the one place that knows these facts by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from ssl_pipeline.config import ConfigError

LoggedRow = dict[str, int | float | str | None]
"""A row of metrics.jsonl; what is not finite is None."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used, in one sentence."""


@dataclass(frozen=True)
class SavedBackbone:
    """A backbone among the tensors of a checkpoint's method file, with what is needed to build it and to use it.

    prefix: what the names of its tensors begin with. config: that of the backbone, as JSON.
    size, mean, std: side of the images in pixels, and their normalisation.
    """

    prefix: str
    config: dict[str, JsonValue]
    size: Annotated[int, Field(gt=0)]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class SavedClassifier:
    """A linear layer on the features of the first backbone, in the same file."""

    prefix: str
    num_classes: Annotated[int, Field(gt=0)]
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class RunState:
    """Where a run stood when a checkpoint was written, and what its tensors are.

    position: images seen. global_batch: images per optimizer step at that time.
    identity: what a run must share with this one to continue it, besides settings (images, optimizer).
    backbones: by name; the first is the one that a run exports. classifier: of a method that learns to classify.
    scaler: the state of fp16's GradScaler.
    row: the logged row of this step, if it has one, without what monitors add after the checkpoint is written.
    start: the monitors' figures before the first step that later ones are compared with.
    steps: optimizer steps made, of whatever size; None before ssl-pipeline 0.3.0, where all counted as of the last one.
    left_out_steps: how many of them were left out because they were not finite (train.on_nan=skip).
    labelled_position: labelled images seen. settings: all of the run's, as its config.yaml. None before that version
    too.
    """

    position: Annotated[int, Field(ge=0)]
    global_batch: Annotated[int, Field(gt=0)]
    identity: dict[str, str] = field(default_factory=dict)
    backbones: dict[str, SavedBackbone] = field(default_factory=dict)
    classifier: SavedClassifier | None = None
    scaler: dict[str, int | float] | None = None
    row: LoggedRow | None = None
    start: dict[str, float] = field(default_factory=dict)
    steps: Annotated[int, Field(ge=0)] | None = None
    labelled_position: Annotated[int, Field(ge=0)] | None = None
    settings: dict[str, JsonValue] | None = None
    left_out_steps: Annotated[int, Field(ge=0)] = 0

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.steps if self.steps is not None else self.position // self.global_batch

    def to_facts(self) -> dict[str, JsonValue]:
        """The facts of a manifest."""
        return _SCHEMA.dump_python(self, mode="json")

    @classmethod
    def from_facts(cls, facts: Mapping[str, JsonValue]) -> RunState:
        """The state that `to_facts` described; CheckpointError names the first fact that is missing or wrong."""
        try:
            return _SCHEMA.validate_json(json.dumps(facts), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            fact = f"fact '{name}'" if name else "facts"
            raise CheckpointError(f"its {fact} cannot be read ({first['msg']}).") from None


_SCHEMA = TypeAdapter(RunState)

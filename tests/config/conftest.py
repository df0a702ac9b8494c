"""A small schema with every kind of key, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from ssl_pipeline.config import Config, ConfigError, load
from ssl_pipeline.schedule import Duration, Schedule


class DistilConfig(Config):
    name: Literal["distil"]
    num_prototypes: int = Field(64, gt=1)
    """Width of the output."""
    teacher_momentum: Schedule = Schedule(value=0.996, final=1.0, warmup="5%", start=0.9)
    """Share of the teacher that an update keeps."""
    freeze_for: Duration = Duration("1ep")


class ContrastConfig(Config):
    name: Literal["contrast"]
    temperature: float = Field(0.1, gt=0)
    projector_dim: int = 128


class ViewsConfig(Config):
    count: int = 1
    size: int
    """Side in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    blur_prob: float | tuple[float, ...] = 0.0

    @model_validator(mode="after")
    def _one_per_view(self) -> ViewsConfig:
        if isinstance(self.blur_prob, tuple) and len(self.blur_prob) != self.count:
            raise ValueError(f"blur_prob must have one value or one per view (count={self.count}).")
        return self


class OptimConfig(Config):
    name: Literal["adamw", "sgd"]
    lr: Schedule
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = Field(None, gt=0)


class DataConfig(Config):
    shards: str
    batch_size: int = Field(ge=1)
    sizes: tuple[int, ...] = (1,)


class ToyConfig(Config):
    """Train a toy."""

    recipe: str | None = None
    output: Path | None = None
    """Where the run goes."""
    seed: int = Field(0, ge=0)
    precision: Literal["bf16", "no"] = "no"
    compile: bool = False
    arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    method: Annotated[DistilConfig | ContrastConfig, Field(discriminator="name")]
    augment: dict[str, ViewsConfig]
    optim: OptimConfig
    data: DataConfig

    @model_validator(mode="after")
    def _not_both(self) -> ToyConfig:
        if self.compile and self.precision == "bf16":
            raise ValueError("compile works with precision=no only.")
        return self


DISTIL = """\
method: {name: distil}
arguments: {img_size: 32}
augment:
  global: {count: 2, size: 32, blur_prob: [1.0, 0.1]}
  local: {size: 16}
optim:
  name: adamw
  lr: {value: 5e-4, warmup: 10ep, final: 1e-6}
data: {shards: data/train, batch_size: 64}
"""
CONTRAST = """\
method: {name: contrast}
augment:
  view: {size: 32}
optim: {name: sgd, lr: 0.1}
data: {shards: data/train, batch_size: 64}
"""


@pytest.fixture(scope="session")
def schema() -> type[ToyConfig]:
    return ToyConfig


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "distil_small.yaml").write_text(DISTIL)
    (folder / "contrast_small.yaml").write_text(CONTRAST)
    return folder


@pytest.fixture
def read(recipes: Path) -> Callable[..., ToyConfig]:
    """Settings of `distil_small` with the given arguments on top."""

    def read(*argv: str, recipe: str = "distil_small") -> ToyConfig:
        return load(ToyConfig, [f"recipe={recipe}", *argv], recipes=recipes)

    return read


@pytest.fixture
def refusal(read: Callable[..., ToyConfig]) -> Callable[..., str]:
    """What the user is told of arguments that are wrong."""

    def refusal(*argv: str, recipe: str = "distil_small") -> str:
        with pytest.raises(ConfigError) as caught:
            read(*argv, recipe=recipe)
        return str(caught.value)

    return refusal

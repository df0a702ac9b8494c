"""What an operation on the colours of views is: settings, random numbers, and two ways to apply it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config import Config, InRange
from ssl_pipeline.config.ranges import plain

# V views of each of B images; N: the same images, one view at a time; U uniforms in [0, 1), P draws of an operation

PerView = float | tuple[float, ...]
"""One value for all views of a group, or one per view."""
Channels = tuple[float, float, float]
"""Of red, green and blue."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Probability = Annotated[PerView, InRange(ge=0, le=1)]
Strength = Annotated[PerView, InRange(ge=0, le=100)]


@dataclass(frozen=True)
class ColourRange(InRange):
    """The range of values for colours in [0, 1]; for values meant for 0 to 255 the error gives the numbers to type."""

    def check(self, value: Any) -> Any:
        """The value; raises ValueError for a number of it outside the range."""
        assert self.le is not None
        if self.le < max(value) <= 255 and min(value) >= 0:
            levels, instead = ([plain(number) for number in numbers] for numbers in (value, _in_one(value)))
            raise ValueError(
                f"must be for colours from 0 to 1, not to 255: write [{','.join(instead)}]. Got [{','.join(levels)}]."
            )
        return super().check(value)


def _in_one(levels: Channels) -> list[float]:
    return [round(level / 255, 5) for level in levels]


# beyond colours themselves: 0.8 * x + 0.1, the input of DALL-E's tokenizer, is a mean of -0.125 and a deviation of 1.25
Mean = Annotated[Channels, ColourRange(ge=-1, le=1)]
Deviation = Annotated[Channels, ColourRange(ge=0.001, le=2)]


class ViewSettings(Config):
    """What the settings of all operations build on."""

    count: int = Field(1, ge=1, le=1000)
    """Number of views of each image."""
    size: Annotated[int | tuple[int, ...], InRange(ge=1, le=8192)]
    """Height and width of a view in pixels; with several, each optimizer step draws one for all its views (DINOv3)."""
    size_weights: Annotated[tuple[float, ...], InRange(ge=0)] = ()
    """How often each of several sizes is drawn; by default all equally. Groups with the same weights change together:
    the first size of one comes with the first size of the others."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides in pixels that views can have."""
        return self.size if isinstance(self.size, tuple) else (self.size,)

    def per_view(self, value: PerView) -> tuple[float, ...]:
        """One value for each of the `count` views."""
        values = value if isinstance(value, tuple) else (value,)
        return values * self.count if len(values) == 1 else values


Settings = TypeVar("Settings", bound=ViewSettings)
Setting = TypeVar("Setting", bound=Hashable)


class Operation(Generic[Settings, Setting]):
    """One thing that may happen to the colours of a view. It has no state of its own.

    The host draws numbers for each view and image; the device, wherever that is, applies the operation to a batch of
    float32 images in [0, 1] by these numbers. Both know the group's keys from `settings`, a base of ViewGroup.
    """

    settings: type[Settings]
    whole_batches: ClassVar[bool] = False
    """Whether a CPU should get all images at once, where it sorts them on its own."""

    def mistakes(self, group: Settings) -> list[str]:
        """What is wrong with the settings: one sentence each, beginning with the key."""
        return []

    def num_uniforms(self, group: Settings) -> int:
        """How many uniforms it takes for one view of one image: U. With 0 where it is off, recipes without it keep
        the views that they had before there was such an operation."""
        raise NotImplementedError

    def num_draws(self, group: Settings) -> int:
        """How many numbers it makes of them: P."""
        raise NotImplementedError

    def draw(self, uniforms_VBU: NDArray[np.float64], group: Settings, *, size: int) -> NDArray[np.float32]:
        """(V,B,P): what happens to each view of `size` pixels; runs on the host, if the operation takes uniforms."""
        raise NotImplementedError

    def setting(self, group: Settings, view: int, *, size: int) -> Setting | None:
        """What is the same for all images of this view; None if the operation never happens to it."""
        raise NotImplementedError

    def alike(self, draws_NP: Tensor) -> Sequence[Hashable] | None:
        """A key of each image; `on_cpu` gets only images of one key. None: it takes any."""
        return None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: Setting) -> Tensor:
        """The images (N,3,H,W), or (N,1,H,W) if all are gray, after the operation; may be written in place."""
        raise NotImplementedError

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: Setting) -> Tensor:
        """The images (N,3,H,W) after the operation, computed for all of them: no value decides what is done."""
        raise NotImplementedError


class ByChance(Operation[Settings, Setting]):
    """An operation that happens to a view with a probability, or not at all. Draws: 1 if it happens."""

    probability: ClassVar[str]
    """The key of its probability."""
    draws_if_off: ClassVar[bool] = False
    """Whether it takes its uniform where it is off too, as those of the first recipes did."""

    def probabilities(self, group: Settings) -> tuple[float, ...]:
        """That of each view."""
        return group.per_view(getattr(group, self.probability))

    def mistakes(self, group: Settings) -> list[str]:
        return per_view_mistakes(group, self.probability)

    def num_uniforms(self, group: Settings) -> int:
        return int(self.draws_if_off or any(self.probabilities(group)))

    def num_draws(self, group: Settings) -> int:
        return self.num_uniforms(group)

    def draw(self, uniforms_VBU: NDArray[np.float64], group: Settings, *, size: int) -> NDArray[np.float32]:
        return happens(uniforms_VBU[..., 0], group, self.probabilities(group))[..., None].astype(np.float32)


class Stage(NamedTuple):
    """An operation that can happen to a view, its setting there, and the columns of its draws."""

    operation: Operation
    setting: Hashable
    first: int
    end: int

    def draws(self, draws_NP: Tensor) -> Tensor:
        """Its own of the draws of all operations."""
        return draws_NP[:, self.first : self.end]


class Stages(NamedTuple):
    """Whatever can happen to a view; equal for views that one pass can make."""

    operations: tuple[Stage, ...]
    factor: Channels  # of the normalisation: value * factor + offset, which is (value - mean) / std to rounding
    offset: Channels


def per_sample(values_N: Tensor) -> Tensor:
    """(N,) -> (N,1,1,1), which multiplies images."""
    return values_N[:, None, None, None]


def change_due(
    image_NCHW: Tensor, draws_NP: Tensor, due_N: Tensor, change: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """For a CPU: `change` of the images that are due and of their draws, computed only for these."""
    if due_N.all():
        return change(image_NCHW, draws_NP)
    if due_N.any():
        image_NCHW[due_N] = change(image_NCHW[due_N], draws_NP[due_N])
    return image_NCHW


def happens(uniforms_VB: NDArray[np.float64], group: ViewSettings, probability: PerView) -> NDArray[np.bool_]:
    """(V,B): whether something of the given probability, one or one per view, happens."""
    return uniforms_VB < np.array(group.per_view(probability))[:, None]


def per_view_mistakes(group: ViewSettings, *names: str) -> list[str]:
    """One sentence for each of the named settings that has neither one value nor one per view."""
    values = {name: getattr(group, name) for name in names}
    return [
        f"{name} must have one value or one per view (count={group.count}). Got {len(value)} values."
        for name, value in values.items()
        if isinstance(value, tuple) and len(value) not in (1, group.count)
    ]


def range_mistakes(*checks: tuple[bool, str, str, object]) -> list[str]:
    """One sentence for each check (whether it holds, the key, what is needed, what came) that does not hold."""
    return [f"{name} must be {needed}. Got {got}." for holds, name, needed, got in checks if not holds]

"""What a recipe may ask of a group of views."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from ssl_pipeline.augment.operations import OPERATIONS, Operation, ViewSettings
from ssl_pipeline.augment.operations.base import Deviation, Mean, Probability, per_view_mistakes, range_mistakes
from ssl_pipeline.config import ConfigError, InRange, nearest


class CropSettings(ViewSettings):
    """How views are cut out of their image."""

    crops_of: str | None = None
    """Another group whose boxes and flips these views share, at their own size (BEiT's tokens, DINOv3's Gram
    teacher). An operation draws the same numbers for both groups if it needs equally many in both."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    """random_resized: a random part of the image, resized. pad: the whole image, shifted by up to `padding` of its
    size and reflected where it runs out (FixMatch's weak view)."""
    scale: Annotated[tuple[float, float], InRange(gt=0, le=1, increasing=True)] = (0.08, 1.0)
    """Smallest and largest area of a random_resized crop, as a fraction of the image."""
    aspect: Annotated[tuple[float, float], InRange(ge=0.01, le=100, increasing=True)] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random_resized crop."""
    padding: float = Field(0.125, ge=0, le=0.5)
    """Largest shift of a pad crop, as a fraction of the image's size."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized; both are antialiased."""
    flip_prob: Probability = 0.5
    """Probability of a horizontal flip."""
    mean: Mean | None = None
    """Subtracted from red, green and blue in [0, 1] at the end; by default data.mean."""
    std: Deviation | None = None
    """What red, green and blue are divided by after that; by default data.std."""


BOX_KEYS = ("crop", "scale", "aspect", "padding", "flip_prob")  # no effect with crops_of

# all keys of the operations; of several bases pydantic takes the fields of the last one first
_operation_settings: Any = create_model(
    "OperationSettings", __base__=tuple(operation.settings for operation in reversed(OPERATIONS))
)


class ViewGroup(_operation_settings, CropSettings):
    """Views of one size and how they are made: crop, flip, then each operation of augment/operations in its order.

    The defaults are the official DINO's for a view without blur. Whatever takes a probability or a jitter strength
    takes one value, or one per view. Without any operation (`jitter_prob`, `gray_prob`, ... 0) a view is only
    normalised.
    """

    operations: ClassVar[tuple[Operation, ...]] = OPERATIONS
    """What can happen to the colours, in this order."""

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any:
            """The keys of the operations, which no type checker sees."""

    @model_validator(mode="after")
    def _check(self) -> ViewGroup:
        mistakes = [mistake for operation in self.operations for mistake in operation.mistakes(self)]
        mistakes += [*per_view_mistakes(self, "flip_prob"), *self._size_mistakes(), *self._box_mistakes()]
        if mistakes:
            raise ValueError(" ".join(mistakes))
        return self

    def _size_mistakes(self) -> list[str]:
        sizes, weights = self.sizes, self.size_weights
        return range_mistakes(
            (bool(sizes), "size", "a number of pixels, or several", "none"),
            (
                not weights or (len(weights) == len(sizes) and sum(weights) > 0),
                "size_weights",
                f"a share for each of the {len(sizes)} sizes",
                weights,
            ),
        )

    def _box_mistakes(self) -> list[str]:
        if self.crops_of is None:
            return []
        given = [key for key in BOX_KEYS if getattr(self, key) != CropSettings.model_fields[key].default]
        defaults = {key: json.dumps(CropSettings.model_fields[key].default) for key in given}
        return [
            f"{key} has no effect with crops_of={self.crops_of}. Leave it out; if the recipe sets it, write "
            f"{key}={default.strip(chr(34))}."
            for key, default in defaults.items()
        ]


def check_crops_of(groups: Mapping[str, ViewGroup]) -> None:
    """Raises ConfigError if a group has the crops of one that is not there, that has none of its own, or of another
    number of views.
    """
    for name, group in groups.items():
        if group.crops_of is None:
            continue
        others = [other for other in groups if other != name]
        source = groups[group.crops_of] if group.crops_of in others else None
        if source is None:
            raise ConfigError(
                f"augment.{name}.crops_of must be another group of views that the method reads: "
                f"{', '.join(others) or 'there is none'}. Got '{group.crops_of}'.{nearest(group.crops_of, others)}"
            )
        if source.crops_of is not None:
            raise ConfigError(
                f"augment.{name}.crops_of must be a group with crops of its own. Got '{group.crops_of}', which uses "
                f"those of '{source.crops_of}'."
            )
        if source.count != group.count:
            raise ConfigError(
                f"augment.{name}.count must equal that of augment.{group.crops_of}, {source.count}, whose crops it "
                f"uses. Got {group.count}."
            )

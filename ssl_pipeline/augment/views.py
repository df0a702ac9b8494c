"""What a recipe may ask of a group of views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import create_model, model_validator

from ssl_pipeline.augment.operations import OPERATIONS, Operation, PerView, ViewSettings
from ssl_pipeline.augment.operations.base import per_view_mistakes, range_mistakes


class CropSettings(ViewSettings):
    """How views are cut out of their image."""

    crop: Literal["random_resized", "pad"] = "random_resized"
    """random_resized: a random part of the image, resized. pad: the whole image, shifted by up to `padding` of its
    size and reflected where it runs out (FixMatch's weak view)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random_resized crop, as a fraction of the image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random_resized crop."""
    padding: float = 0.125
    """Largest shift of a pad crop, as a fraction of the image's size."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized; both are antialiased."""
    flip_prob: PerView = 0.5
    """Probability of a horizontal flip."""


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

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides in pixels that views of this group can have."""
        return (self.size,)

    @model_validator(mode="after")
    def _check(self) -> ViewGroup:
        mistakes = [mistake for operation in self.operations for mistake in operation.mistakes(self)]
        mistakes += self._crop_mistakes()
        if mistakes:
            raise ValueError(" ".join(mistakes))
        return self

    def _crop_mistakes(self) -> list[str]:
        return [
            *per_view_mistakes(self, flip_prob=1.0),
            *range_mistakes(
                (self.count >= 1, "count", "at least 1", self.count),
                (self.size >= 1, "size", "at least 1 pixel", self.size),
                (0 < self.scale[0] <= self.scale[1] <= 1, "scale", "an increasing pair in (0, 1]", self.scale),
                (0 < self.aspect[0] <= self.aspect[1], "aspect", "an increasing pair above 0", self.aspect),
                (0 <= self.padding <= 0.5, "padding", "between 0 and 0.5", self.padding),
            ),
        ]

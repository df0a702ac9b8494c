"""What a method says it needs, and what it is given: the views of some images by the name of their group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from ssl_pipeline.config import ConfigError

# Axes: V views of each of B images, L patches row by row.


Kind = Literal["random", "blocks", "units"]


@dataclass(frozen=True)
class MaskRule:
    """How the patches of a view are masked. The data path draws the masks, from the sample and never from the rank.

    random: `ratio` of the patches, L - int(L * (1 - ratio)) of them (MAE).
    units: ceil(U * ratio) of the U squares of `unit` x `unit` patches (SimMIM).
    blocks: rectangles until `num_masked`, or ratio * L, patches are masked (BEiT, iBOT, DINOv2).
    """

    kind: Kind
    patch_size: int
    """Side of a patch in pixels: a view of S pixels has (S / patch_size)^2 patches."""
    ratio: float | tuple[float, float] = 0.0
    """Share of the patches that is masked; a pair: drawn uniformly in between, for each view of each image."""
    num_masked: int | None = None
    """blocks only: how many patches are masked, in place of `ratio` (BEiT: 75)."""
    probability: float = 1.0
    """Share of the views that get a mask at all."""
    stratified: bool = False
    """Whether the optimizer step's whole global batch has exactly that share of masked views, with ratios spread evenly
    (DINOv2); otherwise each view draws independently."""
    unit: int = 1
    """units only: side of a unit in patches."""
    min_block: int = 4
    """blocks only: smallest area of a block in patches."""
    max_block: int | None = None
    """blocks only: largest area of a block in patches; null: no bound."""
    min_aspect: float = 0.3
    """blocks only: smallest height / width of a block."""
    max_aspect: float | None = None
    """blocks only: largest height / width of a block; null: 1 / min_aspect."""
    exact: bool = False
    """blocks only: whether random patches fill up what the blocks leave (BEiT v2)."""

    def num_kept(self, num_patches: int) -> int:
        """For kind random with one ratio: how many patches of a view are not masked, a number that the host knows."""
        assert self.kind == "random"
        assert isinstance(self.ratio, float)
        return int(num_patches * (1 - self.ratio))

    def most_masked(self, num_patches: int) -> int:
        """How many patches of a view the largest `ratio` masks."""
        ratio = max(self.ratio) if isinstance(self.ratio, tuple) else self.ratio
        if self.kind == "units":
            return math.ceil(num_patches // self.unit**2 * ratio) * self.unit**2
        return num_patches - int(num_patches * (1 - ratio)) if self.kind == "random" else int(num_patches * ratio)

    def __post_init__(self) -> None:
        low, high = self.ratio if isinstance(self.ratio, tuple) else (self.ratio, self.ratio)
        counted = self.num_masked is not None
        checks = (
            (self.kind in get_args(Kind), "kind", f"one of {', '.join(get_args(Kind))}", self.kind),
            (self.patch_size >= 1, "patch_size", "at least 1", self.patch_size),
            (0 <= low <= high < 1 or (low, high) == (1, 1), "ratio", "between 0 and 1, a pair increasing", self.ratio),
            (0 <= self.probability <= 1, "probability", "between 0 and 1", self.probability),
            (not counted or self.kind == "blocks", "num_masked", "left out unless kind is blocks", self.num_masked),
            (not (counted and self.stratified), "num_masked", "left out of stratified masks", self.num_masked),
            (self.unit >= 1, "unit", "at least 1", self.unit),
            (1 <= self.min_block <= (self.max_block or math.inf), "min_block", "from 1 to max_block", self.min_block),
            (self.min_aspect > 0, "min_aspect", "above 0", self.min_aspect),
        )
        for holds, name, needed, got in checks:
            if not holds:
                raise ConfigError(f"{name} of a mask must be {needed}. Got {got}.")


@dataclass(frozen=True)
class Views:
    """A group of views that a method reads."""

    name: str
    count: int | None = None
    """How many views of an image there must be; None: as many as the recipe says."""
    optional: bool = False
    """Whether a recipe may leave the group out."""
    labelled: bool = False
    """Whether the views are of the labelled images, in `batch.labelled`."""
    with_labels: bool = False
    """Whether the labels of these images are learnt: all of data.shards need one, if it is not `labelled`."""
    evaluated: bool = False
    """Whether evaluators show the backbone images of this group's size; without any, that of the first group."""
    mask: MaskRule | None = None
    """How its views are masked; None: not at all."""
    crops_of: str | None = None
    """The group whose crops they must be, at a size of their own; None: the recipe decides."""
    for_backbone: bool = True
    """Whether the backbone sees the views, so that they need a size that it takes; False where only another network
    does (the tokenizer of BEiT)."""


@dataclass(frozen=True)
class RunFacts:
    """What a method may want to know of a run before it begins.

    num_images: of the (unlabelled) set.
    num_classes: of the labelled images: as many as `class_names`, or the largest label + 1 where no names are known;
        None without labelled images.
    global_batch: images per optimizer step, over all processes and micro-batches.
    view_sizes: the sides in pixels of each group of views, one or several. mean, std: of the normalisation.
    micro_batch: images that go through the network at once, over all processes; None: as many as `global_batch`.
    group_mean, group_std: of the normalisation of the groups of views that have their own.
    """

    num_images: int
    num_classes: int | None
    global_batch: int
    view_sizes: Mapping[str, tuple[int, ...]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...] | None = None
    micro_batch: int | None = None
    group_mean: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    group_std: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    def normalisation(self, group: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and std of the images of augment.GROUP."""
        return self.group_mean.get(group, self.mean), self.group_std.get(group, self.std)

    def require_normalisation(self, group: str, mean: Sequence[float], std: Sequence[float], *, why: str) -> None:
        """Raises ConfigError if the images of augment.GROUP are normalised differently; `why` begins the sentence."""
        own = self.normalisation(group)
        if any(abs(a - b) > 1e-4 for a, b in zip((*own[0], *own[1]), (*mean, *std), strict=True)):
            raise ConfigError(
                f"{why} images with mean {list(mean)} and std {list(std)}. Got mean {list(own[0])} and std "
                f"{list(own[1])}; set augment.{group}.mean and .std."
            )

    def classes(self, wanted: int | None) -> int:
        """The number of classes: `wanted`, or the labelled images' if it is None; ConfigError if the two disagree."""
        found = self.num_classes
        if found is None:
            raise ConfigError("The number of classes is not known without labelled images. Set data.labelled.")
        if wanted is None or wanted == found or (self.class_names is None and wanted > found):
            return wanted or found
        raise ConfigError(
            f"method.num_classes must be the number of classes of the labelled images, {found}. Got {wanted}; "
            "method.num_classes=null takes theirs."
        )


@dataclass(frozen=True)
class Batch:
    """B images as named groups of views.

    views: group name -> (V, B, C, H, W), normalised; V is the group's count, and all views of a group have one size.
    labels: (B,) int64, -1 where an image has none; or (B, classes) float32 of soft labels.
    sample_ids: (B,) int64, the number of each image in the data set.
    masks: group name -> (V, B, L) bool, True = masked, for groups that have a MaskRule.
    labelled: a second batch, of labelled images, for semi-supervised methods.
    masked: group name -> (M,) int64, where its flattened masks are True, in order; found while they are on the host.
    """

    views: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    labelled: Batch | None = None
    masked: dict[str, Tensor] = field(default_factory=dict)

    def masked_patches(self, name: str) -> Tensor:
        """(M,) int64, where the flattened masks (V * B * L,) of a group are True, in order.

        A batch of the data path has them; for one made by hand they are searched, and the host waits for the device.
        """
        return self.masked[name] if name in self.masked else self.masks[name].flatten().nonzero().flatten()

    def one(self, name: str) -> Tensor:
        """The single view (B, C, H, W) of a group."""
        (view,) = self.views[name]
        return view

    def two(self, name: str) -> tuple[Tensor, Tensor]:
        """The two views of a group, each (B, C, H, W)."""
        first, second = self.views[name]
        return first, second

"""Features of an image set by a frozen backbone, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.data.evaluation import EvaluationSet, evaluation_batches
from ssl_pipeline.data.samples import ImageSource
from ssl_pipeline.distributed import failing_together, gather, rank, world_size
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.progress import Bar, progress_bar
from ssl_pipeline.machine import keep_freed_memory

Item = TypeVar("Item")
Precision = Literal["no", "bf16", "fp16"]
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GATHERED_ROWS = 65_536  # per rank and collective: the device never holds the features of all images


class Change(Protocol):
    """A change of the evaluation's pixels before a network sees them: corruptions, random views."""

    def __call__(self, pixels_BCHW: Tensor, ids_B: Tensor, device: torch.device) -> Tensor:
        """8-bit pixels (B, 3, S, S) on the CPU of the images `ids_B` -> pixels in [0, 255] on `device`, same shape."""


def extract_features(
    backbone: nn.Module,
    index: ImageSource,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device | str = "cpu",
    precision: Precision = "no",
    description: str = "features",
    samples: Sequence[int] | None = None,
    change: Change | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) int64 of every image, in the order of `index`, on the CPU.

    `samples` are those that are wanted, by their numbers, if not all are; `change` is applied to their pixels.

    `backbone` maps (B, 3, S, S) on `device` to (B, D). It runs in eval mode; every module gets its own mode back
    afterwards, and the global random state is not touched. With a process group each rank computes a contiguous
    share and all ranks return everything; an error on one is an error on all. A label of -1 means that the image has
    none.
    """
    device = torch.device(device)
    wanted = range(len(index)) if samples is None else samples
    share = share_size(len(wanted))
    own = wanted[rank() * share : (rank() + 1) * share] or wanted[:1]
    features, labels = torch.empty(0), torch.full((share,), -1)
    done = 0
    with (
        failing_together(device),
        forward_passes(
            FeatureKinds(backbone),
            index,
            own,
            preprocessing,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            description=description,
            change=change,
        ) as batches,
    ):
        for output, batch_labels in batches:
            pooled = output["pooled"]
            end = done + len(pooled)
            if done == 0:
                features = torch.zeros(share, pooled.shape[1])
            features[done:end] = pooled.cpu()
            labels[done:end] = batch_labels
            done = end
    return _all_shares(features, device)[: len(wanted)], _all_shares(labels, device)[: len(wanted)]


@dataclass(frozen=True)
class Extraction:
    """How features are computed, for those that compute them again and again (`extract_features`)."""

    preprocessing: Preprocessing
    batch_size: int
    workers: int
    device: torch.device | str = "cpu"
    precision: Precision = "no"

    def resized_by(self, interpolation: Interpolation) -> Extraction:
        """The same with another way to resize images."""
        return replace(self, preprocessing=replace(self.preprocessing, interpolation=interpolation))

    def features(self, backbone: nn.Module, index: ImageSource, *, description: str, samples: Sequence[int]) -> Tensor:
        """(N, D) float32 of these images, on the CPU."""
        features_ND, _ = extract_features(
            backbone,
            index,
            self.preprocessing,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            description=description,
            samples=samples,
        )
        return features_ND


def share_size(num_images: int) -> int:
    """Images of each rank, rounded up: the last shares may be smaller, or empty."""
    return -(-num_images // world_size())


@contextmanager
def forward_passes(
    network: FeatureKinds,
    index: ImageSource,
    samples: Sequence[int],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: Precision,
    description: str,
    change: Change | None = None,
) -> Iterator[Iterator[tuple[dict[str, Tensor], Tensor]]]:
    """Inside the block: for each batch of `samples`, in order, what `network` makes of it on `device`, and its labels.

    The network runs in eval mode and without gradient; the first rank shows how fast it goes and how long it takes.
    """
    if device.type == "cpu":
        keep_freed_memory()
    read = evaluation_batches(
        EvaluationSet(index, preprocessing.size, preprocessing.interpolation, preprocessing.fit),
        samples,
        batch_size=batch_size,
        workers=workers,
    )
    to_pixels = change or _as_they_are
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    autocast = torch.autocast(device.type, AUTOCAST_DTYPES.get(precision), enabled=precision != "no")
    with (
        progress_bar(len(samples), description, unit="image") as bar,
        eval_mode(network),
        torch.no_grad(),  # not inference_mode: what a backbone keeps (a position table) must serve training later
        autocast,
    ):
        outputs = (
            (network(to_pixels(pixels, ids, device).float().div_(255).sub_(mean).div_(std)), batch_labels)
            for pixels, batch_labels, ids in read
        )
        yield _counted(_one_late(outputs), bar)


def _as_they_are(pixels_BCHW: Tensor, ids_B: Tensor, device: torch.device) -> Tensor:
    return pixels_BCHW.to(device, non_blocking=True)


def _counted(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], bar: Bar
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same batches; each is counted once its consumer is done with it."""
    for output, labels in batches:
        yield output, labels
        bar.update(len(labels))


def _one_late(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next is under way: a GPU computes that one while this one is copied to the host."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is in its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _all_shares(share: Tensor, device: torch.device) -> Tensor:
    """The equal shares of all ranks, one after the other, on the CPU."""
    if world_size() == 1:
        return share
    whole = share.new_empty(world_size(), *share.shape)
    for start in range(0, len(share), GATHERED_ROWS):
        rows = share[start : start + GATHERED_ROWS].to(device)
        whole[:, start : start + len(rows)] = gather(rows).unflatten(0, (world_size(), -1)).cpu()
    return whole.flatten(0, 1)

"""Retrieval: how high the images of a query's class rank among all others, by the cosine of frozen features.

As DINO evaluates retrieval (Caron et al., 2021, section 4.2, https://arxiv.org/abs/2104.14294): features of length 1,
ranked by their products, nothing is trained; average precision as the protocol of the revisited Oxford and Paris counts
it (Radenovic et al., 2018, https://arxiv.org/abs/1803.11285), over the classes of the images instead of its landmarks.
Recall at k is metric learning's: whether one image of the class is among the first k (Jegou et al., 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import mean_interval, share_interval
from ssl_pipeline.eval.labelled import LabelledImages, open_labelled, say
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.progress import progress_bar
from ssl_pipeline.eval.protocol import EvaluationConfig, LabelledFeatures, Measured, conclude, measure_models
from ssl_pipeline.eval.search.neighbours import (
    Search,
    nearest_neighbours,
    other_neighbours,
    require_finite,
    search_device,
)
from ssl_pipeline.files import JSON

RANKED_AT_ONCE = 2**24  # similarities of the queries that are ranked together: 64 MB, and as much for their order

# Axes: N queries, M images of the bank, B queries of one block, R ranks, D feature dimensions.


class RetrievalConfig(EvaluationConfig):
    """How well frozen features find images of a query's class: mean average precision and recall at k."""

    leave_one_out: bool = False
    """Whether every image looks for the others of the same set, with test=train; else test images look in train."""
    recall_at: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 5, 10), min_length=1)
    """The k of recall at k."""
    depth: Annotated[int, Field(gt=0)] | None = None
    """How many of the first images mean average precision counts; by default all are ranked."""
    search: Search = "auto"
    """With `depth`: how the first images are found, exactly either way, as in eval.knn."""

    @model_validator(mode="after")
    def _one_set_for_leave_one_out(self) -> RetrievalConfig:
        if self.leave_one_out and self.test != self.train:
            raise ValueError(f"leave_one_out=true looks for the images of train: set test={self.train}.")
        if self.depth is not None and self.depth < max(self.recall_at):
            raise ValueError(
                f"depth={self.depth} must be at least the largest of recall_at. Got recall_at={max(self.recall_at)}."
            )
        return self


def average_precision(relevant_NR: Tensor, positives_N: Tensor) -> Tensor:
    """Average precision (N,) of rankings, best first; 0 where there is nothing to be found.

    relevant_NR: whether the image at each rank is of the query's class; positives_N: how many such images there are.
    The area below the precision-recall curve by trapezoids, as the revisited Oxford and Paris measure it: with the i-th
    relevant image (from 0) at rank r (from 0) the mean over i of (i / r + (i + 1) / (r + 1)) / 2, where 0 / 0 = 1.
    """
    found_NR = relevant_NR.double().cumsum(dim=1)
    ranks_R = torch.arange(relevant_NR.shape[1], dtype=torch.float64, device=relevant_NR.device)
    before_NR = torch.where(ranks_R > 0, (found_NR - 1) / ranks_R.clamp(min=1), 1.0)
    precision_NR = (before_NR + found_NR / (ranks_R + 1)) / 2
    return (precision_NR * relevant_NR).sum(dim=1) / positives_N.clamp(min=1)


def rank_all(bank_MD: Tensor, queries_ND: Tensor, *, leave_one_out: bool) -> Iterator[Tensor]:
    """The numbers of all images of the bank (B, R), most similar first, of a block of queries after the other.

    With leave_one_out the queries are the bank, and R = M - 1: an image does not find itself. Of equally similar images
    the lower number comes first.
    """
    size = max(1, RANKED_AT_ONCE // len(bank_MD))
    for first in range(0, len(queries_ND), size):
        similarities_BM = queries_ND[first : first + size] @ bank_MD.T
        if leave_one_out:
            own_B = torch.arange(len(similarities_BM), device=similarities_BM.device)
            similarities_BM[own_B, first + own_B] = -torch.inf
        ranked_BM = similarities_BM.argsort(dim=1, descending=True, stable=True)
        yield ranked_BM[:, :-1] if leave_one_out else ranked_BM


def rank_first(bank_MD: Tensor, queries_ND: Tensor, *, config: RetrievalConfig, depth: int) -> Tensor:
    """The same for only the first `depth` images, of all queries."""
    if config.leave_one_out:
        return other_neighbours(queries_ND, k=depth, search=config.search)[1]
    return nearest_neighbours(bank_MD, queries_ND, k=depth, search=config.search)[1]


def retrieve(features: LabelledFeatures, config: RetrievalConfig) -> Found:
    """Mean average precision and recall at each k, with intervals over the queries."""
    require_finite(features.train, task="Retrieval", what="training images")
    require_finite(features.test, task="Retrieval", what="test images")
    place = search_device(features.train, features.test, choose_device(config.device))
    bank_MD, queries_ND = (normalize(part.to(place), dim=1) for part in (features.train, features.test))
    labels_M, query_labels_N = features.train_labels.to(place), features.test_labels.to(place)
    positives_N = torch.bincount(labels_M, minlength=features.num_classes)[query_labels_N] - int(config.leave_one_out)
    if config.depth is None:
        blocks = rank_all(bank_MD, queries_ND, leave_one_out=config.leave_one_out)
    else:
        positives_N = positives_N.clamp(max=config.depth)
        blocks = iter([rank_first(bank_MD, queries_ND, config=config, depth=config.depth)])
    precisions, hits, done = [], [], 0
    with progress_bar(len(queries_ND), "retrieval", unit="query") as bar:
        for ranked_BR in blocks:
            own = slice(done, done + len(ranked_BR))
            relevant_BR = labels_M[ranked_BR] == query_labels_N[own, None]
            precisions.append(average_precision(relevant_BR, positives_N[own]))
            hits.append(torch.stack([relevant_BR[:, :k].any(dim=1) for k in config.recall_at]))
            done = own.stop
            bar.update(len(ranked_BR))
    precision_N, recall_K = 100.0 * torch.cat(precisions), 100.0 * torch.cat(hits, dim=1).double().mean(dim=1)
    name, title = ("map", "mAP") if config.depth is None else (f"map_at_{config.depth}", f"mAP at {config.depth}")
    measures = [Measure(name, title, precision_N.mean().item(), interval=mean_interval(precision_N))]
    for k, percent in zip(config.recall_at, recall_K.tolist(), strict=True):
        interval = share_interval(percent, len(query_labels_N))
        measures.append(Measure(f"recall_at_{k}", f"recall at {k}", percent, interval=interval))
    return Found(tuple(measures), {"without_positives": int((positives_N == 0).sum())})


def evaluate_retrieval(config: RetrievalConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    images = open_labelled(config.train, config.test, task="retrieval", shared=not config.leave_one_out)
    require_enough(config, images)
    return measure_models(config, images, lambda features: retrieve(features, config)), retrieval_settings(config)


def require_enough(config: RetrievalConfig, images: LabelledImages) -> None:
    """Raise ConfigError if there are fewer images than are counted; say which cannot be found."""
    deepest, others = max(*config.recall_at, config.depth or 1), len(images.train) - config.leave_one_out
    if deepest > others:
        raise ConfigError(
            f"Retrieval needs recall_at and depth of at most the number of images that can be found ({others}). "
            f"Got {deepest}."
        )
    if config.leave_one_out:
        _, counts = images.train_labels.unique(return_counts=True)
        if alone := int((counts == 1).sum()):
            say(
                [f"{alone:,} images of {images.train.called} are the only ones of their class, and count as not found."]
            )


def retrieval_settings(config: RetrievalConfig) -> dict[str, JSON]:
    """The evaluator's part of the protocol."""
    return {
        "ranking": "cosine of the features, equally similar images by their number",
        "average_precision": "trapezoids, as of the revisited Oxford and Paris",
        **config.model_dump(include={"leave_one_out", "recall_at", "depth"}),
    }


def main(config: RetrievalConfig) -> None:
    measured, settings = evaluate_retrieval(config)
    conclude(config, "retrieval", measured, settings)


def command(name: str = "python -m eval.retrieval") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(RetrievalConfig, main, command=name)

"""Weighted k-NN classification of frozen features as DINO votes (https://arxiv.org/abs/2104.14294)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import Config, ConfigError, run_command
from ssl_pipeline.distributed import mean_over_ranks, rank, world_size
from ssl_pipeline.eval.accuracy import top_k_accuracy, top_k_hits
from ssl_pipeline.eval.features.extract import Precision, extract_features
from ssl_pipeline.eval.protocol import (
    EvaluationConfig,
    LabelledFeatures,
    choose_device,
    count_classes,
    measure_models,
    open_labelled,
    write_report,
)
from ssl_pipeline.eval.search.neighbours import (
    Search,
    nearest_neighbours,
    require_finite,
    require_k,
    search_device,
)
from ssl_pipeline.eval.table import format_table, percent
from ssl_pipeline.files import JSON
from ssl_pipeline.schedule import Duration, Progress

# Axes: M training images, N test images, D feature dimensions, K neighbours, C classes.


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Class scores (N, C) of N test images from their k most similar of M training images.

    Shapes: `train_features` (M, D), `train_labels` (M,), `test_features` (N, D); features L2-normalised by the
    caller, so that products are cosine similarities. Each neighbour votes for its class:

        scores[n, c] = sum over the neighbours m of n with label c of  exp(train[m] . test[n] / temperature)

    Raises ValueError if k exceeds M, if a feature is NaN or infinite, or if the votes overflow float32.
    """
    similarities_NK, neighbours_NK = nearest_neighbours(train_features, test_features, k=k)
    labels_NK = train_labels.to(neighbours_NK.device)[neighbours_NK]
    return vote(similarities_NK, labels_NK, temperature=temperature, num_classes=num_classes)


def vote(similarities_NK: Tensor, labels_NK: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """Scores (N, C): the sum of exp(similarity / temperature) over the neighbours of each class."""
    if temperature <= 0:
        raise ConfigError(f"k-NN needs a temperature above 0. Got temperature={temperature}.")
    weights_NK = (similarities_NK / temperature).exp()
    scores_NC = weights_NK.new_zeros(len(weights_NK), num_classes).scatter_add_(1, labels_NK, weights_NK)
    if not scores_NC.isfinite().all():
        raise ConfigError(
            f"k-NN votes exp(similarity / temperature) overflow at temperature={temperature}. "
            "Normalise the features, or try temperature=0.02 or more."
        )
    return scores_NC


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: tuple[int, ...],
    temperature: float,
    num_classes: int,
    search: Search = "auto",
) -> dict[int, dict[str, float]]:
    """`{k: {"top1": percent, "top5": percent}}` for each k, from one search; features need not be normalised."""
    train_MD, test_ND = (normalize(x, dim=1) for x in (train_features, test_features))
    similarities_NK, neighbours_NK = nearest_neighbours(train_MD, test_ND, k=max(k), search=search)
    labels_NK = train_labels.to(neighbours_NK.device)[neighbours_NK]
    return {
        count: top_k_accuracy(
            vote(
                similarities_NK[:, :count],
                labels_NK[:, :count],
                temperature=temperature,
                num_classes=num_classes,
            ),
            test_labels.to(test_ND.device),
        )
        for count in k
    }


class KnnConfig(EvaluationConfig):
    """Weighted k-NN accuracy of frozen features: a run's backbone, or a timm model."""

    k: tuple[Annotated[int, Field(gt=0)], ...] = (20,)
    """Neighbours that vote; several at once as `k=10,20,100,200`, the first is the headline."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(similarity / temperature)."""
    search: Search = "auto"
    """How the neighbours are found, exactly either way: `faiss` on the CPU, `blocks` in bfloat16 where there are units
    for it, then in float32; `auto` takes blocks on GPUs and CPUs with such units and for few test images."""


def evaluate_knn(config: KnnConfig) -> dict[str, JSON]:
    """The k-NN report of the config's model, as it stands in `eval/knn.json`, with a table on stdout."""
    import faiss

    def measure(features: LabelledFeatures) -> dict[int, dict[str, float]]:
        device = search_device(features.train, features.test, choose_device(config.device))
        return knn_accuracy(
            features.train.to(device),
            features.train_labels,
            features.test.to(device),
            features.test_labels,
            k=config.k,
            temperature=config.temperature,
            num_classes=features.num_classes,
            search=config.search,
        )

    images = open_labelled(config.train, config.test, task="k-NN")
    require_k(max(config.k), len(images.train))
    measured = measure_models(config, images, measure, task="k-NN")
    settings: dict[str, JSON] = {
        "k": config.k,
        "temperature": config.temperature,
        "search": config.search,
        "faiss": faiss.__version__,
    }
    report = measured.report(
        lambda by_k: {**by_k[config.k[0]], "by_k": {str(k): accuracy for k, accuracy in by_k.items()}}, settings
    )
    header = ["k-NN", *(f"{name}, k={k}" for k in config.k for name in ("top-1", "top-5"))]
    rows = [
        [label, *(percent(by_k[k][name]) for k in config.k for name in ("top1", "top5"))]
        for label, by_k in measured.rows()
    ]
    print(format_table(header, rows))
    return report


class KnnMonitorConfig(Config):
    """k-NN accuracy of the evaluated backbone during training."""

    every: Duration
    """How often: `5ep`, `10%` or a number of optimizer steps; 0: only at the end, when it is measured in any case."""
    train: str
    """Shards of labelled training images."""
    val: str
    """Shards of labelled validation images, with the same classes."""
    k: Annotated[int, Field(gt=0)] = 20
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(similarity / temperature)."""


class KnnMonitor:
    """Measures a backbone in the middle of its training; all ranks call it together and get the same numbers.

    Each rank extracts a share of the features and finds the neighbours of a share of the validation images.
    """

    def __init__(
        self,
        config: KnnMonitorConfig,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        workers: int,
        device: torch.device | str,
        precision: Precision = "no",
    ) -> None:
        self.every = config.every
        self.config = config
        self.preprocessing = preprocessing
        self.batch_size, self.workers = batch_size, workers
        self.device = device
        self.precision: Precision = precision
        self.images = open_labelled(config.train, config.val, task="k-NN")
        require_k(config.k, len(self.images.train))

    def __call__(self, backbone: torch.nn.Module, progress: Progress) -> dict[str, float]:
        """`{"knn_top1": percent, "knn_top5": percent}` on the validation images."""
        (train, train_labels), (val, val_labels) = (
            extract_features(
                backbone,
                index,
                self.preprocessing,
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                precision=self.precision,
                description=f"k-NN, {name} images",
            )
            for name, index in (("training", self.images.train), ("validation", self.images.test))
        )
        require_finite(train, val)  # before the shares part: an error on one rank alone would leave the others waiting
        share = slice(rank(), None, world_size())
        device = search_device(train, val[share], self.device)
        scores = weighted_knn(
            normalize(train.to(device), dim=1),
            train_labels,
            normalize(val[share].to(device), dim=1),
            k=self.config.k,
            temperature=self.config.temperature,
            num_classes=count_classes(self.images, train_labels, val_labels, task="k-NN"),
        )
        hits = torch.stack([top_k_hits(scores, val_labels[share].to(device), k=k).sum() for k in (1, 5)])
        percents = mean_over_ranks(hits.float().to(self.device)) * world_size() * 100.0 / len(val)
        return {"knn_top1": percents[0].item(), "knn_top5": percents[1].item()}


def main(config: KnnConfig) -> None:
    write_report(config, "knn", evaluate_knn(config))


def command(name: str = "python -m eval.knn") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(KnnConfig, main, command=name)

"""Weighted k-NN classification of frozen features as DINO votes (https://arxiv.org/abs/2104.14294)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.config import Config
from ssl_pipeline.distributed import failing_together, mean_over_ranks, rank, world_size
from ssl_pipeline.eval.features.extract import Extraction
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.eval.labelled import evenly_spread, open_labelled, require_company, some_of_each_class
from ssl_pipeline.eval.measures import Measure, format_table, measures_json, percent, with_interval
from ssl_pipeline.eval.monitors import MonitorConfig, readable_images
from ssl_pipeline.eval.one_figure import USUAL_TEMPERATURE, votes_name
from ssl_pipeline.eval.protocol import (
    EvaluationConfig,
    LabelledFeatures,
    measure_models,
    write_report,
)
from ssl_pipeline.eval.search.neighbours import (
    Search,
    nearest_neighbours,
    other_neighbours,
    require_finite,
    require_k,
    search_device,
)
from ssl_pipeline.eval.votes import vote, voted_hits, votes_accuracy
from ssl_pipeline.files import JSON
from ssl_pipeline.schedule import Progress

Positive = Annotated[float, Field(gt=0)]

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


class VotesConfig(Config):
    """How many neighbours vote, and how."""

    k: tuple[Annotated[int, Field(gt=0)], ...] = Field((20,), min_length=1)
    """Neighbours that vote; several at once as `k=10,20,100,200`, the first is the headline."""
    temperature: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = USUAL_TEMPERATURE
    """Votes weigh exp(similarity / temperature); several at once as `temperature=0.07,0.1`, the first is the
    headline."""
    search: Search = "auto"
    """How the neighbours are found, exactly either way: `faiss` on the CPU, `blocks` in int8 or bfloat16 where the
    hardware has units for them, then in float32; `auto` takes blocks on GPUs, on CPUs with such units or a single
    thread, and for few test images."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)


class KnnConfig(VotesConfig, EvaluationConfig):
    """Weighted k-NN accuracy of frozen features: a run's backbone, or a timm model."""

    leave_one_out: bool = False
    """Whether every image is classified by all others of the same set, with test=train."""
    per_class: Annotated[int, Field(gt=0)] | None = None
    """Training images of each class that vote, drawn by `seed`; by default all of them."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice that `per_class` makes."""

    @model_validator(mode="after")
    def _one_set_for_leave_one_out(self) -> KnnConfig:
        if self.leave_one_out and self.test != self.train:
            raise ValueError(f"leave_one_out=true classifies the images of train: set test={self.train}.")
        if self.leave_one_out and self.per_class is not None:
            raise ValueError(
                "per_class and leave_one_out choose the images that vote in two ways. Leave one of them out."
            )
        return self


ByTemperature = dict[float, dict[int, dict[str, float]]]  # of the accuracies by k


def accuracies(
    config: VotesConfig, similarities_NK: Tensor, labels_NK: Tensor, test_labels_N: Tensor, *, num_classes: int
) -> ByTemperature:
    """The accuracy for each temperature and k, from the neighbours of test images, most similar first."""
    return {
        temperature: votes_accuracy(
            similarities_NK, labels_NK, test_labels_N, k=config.k, temperature=temperature, num_classes=num_classes
        )
        for temperature in config.temperatures
    }


def evaluate_knn(config: KnnConfig) -> dict[str, JSON]:
    """The k-NN report of the config's model, as written to `eval/knn.json`, with a table on stdout."""
    images = open_labelled(config.train, config.test, task="k-NN", shared=not config.leave_one_out)
    voters_M = torch.arange(len(images.train))
    if config.per_class is not None:
        voters_M = torch.from_numpy(some_of_each_class(images, config.per_class, seed=config.seed))
    if config.leave_one_out:
        require_company(images.train_labels, task="k-NN")
    require_k(max(config.k), len(voters_M) - config.leave_one_out)

    def measure(features: LabelledFeatures) -> ByTemperature:
        device, most = search_device(features.train, features.test, choose_device(config.device)), max(config.k)
        train_MD = normalize(features.train[voters_M].to(device), dim=1)
        if config.leave_one_out:
            similarities_NK, neighbours_NK = other_neighbours(train_MD, k=most, search=config.search)
        else:
            test_ND = normalize(features.test.to(device), dim=1)
            similarities_NK, neighbours_NK = nearest_neighbours(train_MD, test_ND, k=most, search=config.search)
        labels_NK = features.train_labels[voters_M].to(device)[neighbours_NK]
        return accuracies(config, similarities_NK, labels_NK, features.test_labels, num_classes=features.num_classes)

    measured = measure_models(config, images, measure)
    num_test = len(images.test)
    print(format_table(*_table(config, measured.rows(), num_test)))
    return measured.report(lambda found: knn_json(config, found, num_test), knn_settings(config))


def knn_settings(config: VotesConfig) -> dict[str, JSON]:
    """k-NN's part of the protocol."""
    import faiss

    return {
        **config.model_dump(include={"k", "leave_one_out", "per_class", "seed", "search"}),
        "temperature": config.temperatures if len(config.temperatures) > 1 else config.temperatures[0],
        "faiss": faiss.__version__,
    }


def knn_json(config: VotesConfig, found: ByTemperature, num_test: int) -> dict[str, JSON]:
    """One model's part of the k-NN report."""
    by_k = found[config.temperatures[0]]
    intervals = {str(k): share_interval(accuracy["top1"], num_test) for k, accuracy in by_k.items()}
    several = {str(temperature): {str(k): by_k[k] for k in by_k} for temperature, by_k in found.items()}
    return {
        "measures": measures_json(_measures(found, num_test)),
        **by_k[config.k[0]],
        "top1_interval": intervals[str(config.k[0])],
        "by_k": several[str(config.temperatures[0])],
        "top1_interval_by_k": intervals,
        **({"by_temperature": several} if len(several) > 1 else {}),
    }


def _measures(found: ByTemperature, num_test: int) -> list[Measure]:
    """Top-1 and top-5 of each k and temperature, in words too where there are several or an unusual one."""
    told = {
        temperature: f", temperature {temperature:g}" if len(found) > 1 or temperature != USUAL_TEMPERATURE else ""
        for temperature in found
    }
    return [
        Measure(
            votes_name(name, k=k, temperature=temperature),
            f"{name.replace('top', 'top-')}, k={k}{told[temperature]}",
            percents[name],
            interval=share_interval(percents[name], num_test),
        )
        for temperature, by_k in found.items()
        for k, percents in by_k.items()
        for name in ("top1", "top5")
    ]


def _table(
    config: KnnConfig, models: list[tuple[str, ByTemperature]], num_test: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each model and temperature, two columns for each k."""
    header = ["k-NN", *(f"{name}, k={k}" for k in config.k for name in ("top-1", "top-5"))]
    rows = []
    for label, found in models:
        for temperature, by_k in found.items():
            row = [f"{label}, temperature {temperature:g}" if len(found) > 1 else label]
            for k in config.k:
                row += [with_interval(by_k[k]["top1"], num_test), percent(by_k[k]["top5"])]
            rows.append(row)
    return header, rows


class KnnMonitorConfig(MonitorConfig):
    """k-NN accuracy of the evaluated backbone during training."""

    train: str
    """Shards of labelled training images."""
    val: str | None = None
    """Shards of labelled validation images, with the same classes; by default each image of `train` is classified by
    all the others."""
    images: Annotated[int, Field(gt=1)] | None = None
    """How many of the images of `train` are used, evenly spread; by default all."""
    k: Annotated[int, Field(gt=0)] = 20
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(similarity / temperature)."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, antialiased in either way."""


class KnnMonitor:
    """Measures a backbone in the middle of its training; all ranks call it together and get the same numbers.

    Each rank extracts a share of the features and finds the neighbours of a share of the validation images.
    """

    def __init__(self, config: KnnMonitorConfig, extraction: Extraction) -> None:
        self.every = config.every
        self.config = config
        self.extraction = extraction.resized_by(config.interpolation)
        val = config.train if config.val is None else config.val
        self.images = open_labelled(config.train, val, task="k-NN", shared=config.val is not None)
        readable = readable_images(config, "knn", self.images.train, extraction.preprocessing.size)
        self.used = self.tested = evenly_spread(self.images.train, config.images or len(readable))
        if config.val is not None:
            self.tested = readable_images(config, "knn", self.images.test, extraction.preprocessing.size)
        if config.val is None:
            require_company(self.images.train_labels[self.used], task="k-NN")
        require_k(config.k, len(self.used) - (config.val is None))

    def __call__(self, backbone: torch.nn.Module, progress: Progress) -> dict[str, float]:
        """`{"knn_top1": percent, "knn_top5": percent}` on the validation images."""
        train_MD = self.extraction.features(
            backbone, self.images.train, description="k-NN, training images", samples=self.used
        )
        train_labels_M = self.images.train_labels[self.used]
        if self.config.val is None:
            val_ND, val_labels_N = train_MD, train_labels_M
        else:
            val_ND = self.extraction.features(
                backbone, self.images.test, description="k-NN, validation images", samples=self.tested
            )
            val_labels_N = self.images.test_labels[self.tested]
        require_finite(train_MD, what="training images")
        require_finite(val_ND, what="validation images")
        with failing_together(self.extraction.device):
            share = slice(rank(), None, world_size())
            device = search_device(train_MD, val_ND[share], self.extraction.device)
            similarities_NK, neighbours_NK = self._neighbours(*(each.to(device) for each in (train_MD, val_ND[share])))
            scores = vote(
                similarities_NK,
                train_labels_M.to(neighbours_NK.device)[neighbours_NK],
                temperature=self.config.temperature,
                num_classes=self.images.num_classes,
            )
            hits = voted_hits(scores, val_labels_N[share].to(device)).sum(dim=1)
        percents = mean_over_ranks(hits.float().to(self.extraction.device)) * world_size() * 100.0 / len(val_ND)
        return {"knn_top1": percents[0].item(), "knn_top5": percents[1].item()}

    def _neighbours(self, train_MD: Tensor, val_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this process's share of the validation images; without the image itself where they are one set."""
        train_MD = normalize(train_MD, dim=1)
        if self.config.val is not None:
            return nearest_neighbours(train_MD, normalize(val_ND, dim=1), k=self.config.k)
        asked_N = torch.arange(len(train_MD), device=train_MD.device)[rank() :: world_size()]
        return other_neighbours(train_MD, k=self.config.k, asked_N=asked_N)


def main(config: KnnConfig) -> None:
    write_report(config, "knn", evaluate_knn(config))


def command(name: str = "python -m eval.knn") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(KnnConfig, main, command=name)

"""What one feature pass says about a backbone: k-NN, linear classifiers, RankMe and alpha-ReQ, classes and
neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.eval.accuracy import ByClass, by_class
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.knn import ByTemperature, VotesConfig, accuracies
from ssl_pipeline.eval.linear import LARGEST_LOGISTIC, ProbeConfig, ProbeResult, linear_probe
from ssl_pipeline.eval.protocol import EvaluationConfig, LabelledFeatures
from ssl_pipeline.eval.search.neighbours import nearest_neighbours, search_device
from ssl_pipeline.eval.spectra import alpha_req, rankme
from ssl_pipeline.eval.votes import vote

SPECTRUM_IMAGES = 2048  # as many as the monitor takes
EXAMPLES, NEIGHBOURS_SHOWN = 8, 5


class SuiteConfig(VotesConfig, ProbeConfig, EvaluationConfig):
    """k-NN, linear classifiers and the spectrum of one backbone's features, with its baselines, from one pass."""

    solver: Literal["auto", "sgd", "logistic"] = "auto"
    """`sgd` is the sweep, `logistic` scikit-learn's L-BFGS; `auto` takes the sweep, and logistic before it for up to 4
    million training features (images * dimensions)."""
    k: tuple[Annotated[int, Field(gt=0)], ...] = Field((20, 10, 100, 200), min_length=1)
    """Neighbours that vote; the first is the headline. Those above the number of training images are left out, with a
    warning."""
    also: tuple[Literal["few_shot", "retrieval"], ...] = ()
    """Evaluators that measure the same features too, with their own defaults: `also=few_shot,retrieval`."""
    baselines: bool = True
    """Whether raw pixels and the same backbone at random initialisation are measured too."""


@dataclass(frozen=True)
class Neighbours:
    """Test images by their numbers, and their most similar training images with the similarities."""

    test: list[int]
    train: list[list[int]]
    similarity: list[list[float]]


@dataclass(frozen=True)
class SuiteResult:
    """The results of one model. classes: what each classifier makes of each class, by its name in the report."""

    knn: ByTemperature
    probes: dict[str, ProbeResult]
    classes: dict[str, ByClass]
    rankme: float
    rankme_percent: float
    alpha: float | None
    neighbours: Neighbours


def measure_all(features: LabelledFeatures, config: SuiteConfig) -> SuiteResult:
    """All measures of one model's features (M, D) and (N, D)."""
    classes, device = {}, choose_device(config.device)
    place = search_device(features.train, features.test, device)
    train_MD, test_ND = (normalize(part.to(place), dim=1) for part in (features.train, features.test))
    similarities_NK, neighbours_NK = nearest_neighbours(train_MD, test_ND, k=max(config.k), search=config.search)
    labels_NK = features.train_labels.to(place)[neighbours_NK]
    scores_NC = vote(
        similarities_NK[:, : config.k[0]],
        labels_NK[:, : config.k[0]],
        temperature=config.temperatures[0],
        num_classes=features.num_classes,
    )
    classes["knn"] = by_class(scores_NC.argmax(dim=1), features.test_labels, num_classes=features.num_classes)
    probes = {}
    for solver in solvers_for(config, features.train):
        own = config.model_copy(update={"solver": solver})
        probes[solver], scores_NC = linear_probe(features, own, device=device)
        classes[solver] = by_class(scores_NC.argmax(dim=1), features.test_labels, num_classes=features.num_classes)
    found, share, alpha = spectrum(features.train)
    return SuiteResult(
        knn=accuracies(config, similarities_NK, labels_NK, features.test_labels, num_classes=features.num_classes),
        probes=probes,
        classes=classes,
        rankme=found,
        rankme_percent=share,
        alpha=alpha,
        neighbours=_examples(similarities_NK, neighbours_NK),
    )


def solvers_for(config: ProbeConfig, train_MD: Tensor) -> list[str]:
    """The linear classifiers that are trained; `auto` takes the sweep, and L-BFGS before it where that is quick."""
    if config.solver != "auto":
        return [config.solver]
    return ["logistic", "sgd"] if train_MD.numel() <= LARGEST_LOGISTIC else ["sgd"]


def spectrum(train_MD: Tensor) -> tuple[float, float, float | None]:
    """RankMe, the same in percent of the largest possible one, and alpha-ReQ, None for too few images.

    Of at most SPECTRUM_IMAGES training images, evenly spread.
    """
    count = min(SPECTRUM_IMAGES, len(train_MD))
    sample_ND = train_MD[torch.arange(count) * len(train_MD) // count]
    found = rankme(sample_ND)
    try:
        alpha: float | None = alpha_req(sample_ND)
    except ValueError:
        alpha = None
    return found, 100.0 * found / min(sample_ND.shape), alpha


def _examples(similarities_NK: Tensor, neighbours_NK: Tensor) -> Neighbours:
    """A few test images, evenly spread, with the nearest training images."""
    count = min(EXAMPLES, len(neighbours_NK))
    test = (torch.arange(count) * len(neighbours_NK) // count).tolist()
    nearest = neighbours_NK[test, :NEIGHBOURS_SHOWN].tolist()
    return Neighbours(test, nearest, similarities_NK[test, :NEIGHBOURS_SHOWN].tolist())

"""Clusters of frozen features and how well they agree with classes: k-means of FAISS, several runs.

As deep clustering is evaluated (IIC, Ji et al., 2019, https://arxiv.org/abs/1807.06653; SCAN, Van Gansbeke et al.,
2020, https://arxiv.org/abs/2005.12320): as many clusters as classes, normalised mutual information, adjusted Rand index
(Hubert & Arabie, 1985), and the accuracy after the best one-to-one matching of clusters and classes (Kuhn, 1955).
"""

from __future__ import annotations

import math
from statistics import mean, pstdev
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError, PlaceText, Seed, printable
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.eval.features.models import EvaluatedModel, baselines_of, open_model
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import mean_interval
from ssl_pipeline.eval.labelled import labels_of, require_labels
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.protocol import Measured, ReportConfig, conclude, features_of, pass_protocol
from ssl_pipeline.eval.search.neighbours import require_finite
from ssl_pipeline.files import JSON

Counts = NDArray[np.int64]

# Axes: N images, D feature dimensions, K clusters, C classes, S seeds.


class ClusteringConfig(ReportConfig):
    """How well clusters of frozen features agree with the classes of the images: NMI, ARI and matched accuracy."""

    images: PlaceText
    """Labelled images: shards, or a folder of class folders or a zip of one, which is packed once. The labels are used
    only for the comparison."""
    clusters: Annotated[int, Field(gt=1, le=10**6)] | None = None
    """Number of clusters; by default the number of classes. Matched accuracy is of clusters that have a class."""
    iterations: Annotated[int, Field(gt=0, le=10**5)] = 100
    """Iterations of k-means at most."""
    restarts: Annotated[int, Field(gt=0, le=1000)] = 5
    """Starts of each run, of which the one with the smallest distances counts; labels play no part in that."""
    runs: Annotated[int, Field(gt=0, le=1000)] = 3
    """Runs of k-means; means are reported, and the standard deviation over runs."""
    seed: Seed = 0
    """Seed of the first run; the next runs take the next seeds."""


def k_means(unit_ND: Tensor, num_clusters: int, *, iterations: int, restarts: int, seed: int) -> tuple[Tensor, float]:
    """The cluster (N,) of each image and the mean squared distance to the centres, by FAISS's k-means on all images."""
    import faiss

    points = unit_ND.float().contiguous().cpu().numpy()
    clustering = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # all of them, without a draw
    )
    clustering.train(points)
    squares_N1, clusters_N1 = clustering.index.search(points, 1)
    return torch.from_numpy(clusters_N1[:, 0]).long(), float(squares_N1.mean())


def contingency(clusters_N: Tensor, labels_N: Tensor, *, num_clusters: int, num_classes: int) -> Counts:
    """Images of each cluster and class (K, C)."""
    places_N = clusters_N.numpy() * num_classes + labels_N.numpy()
    return np.bincount(places_N, minlength=num_clusters * num_classes).reshape(num_clusters, num_classes)


def mutual_information(counts_KC: Counts) -> float:
    """Normalised mutual information 2 I(K; C) / (H(K) + H(C)), between 0 and 1; 1 where both are one group."""
    joint_KC = counts_KC / counts_KC.sum()
    shares_K, shares_C = joint_KC.sum(axis=1), joint_KC.sum(axis=0)
    entropies = _entropy(shares_K) + _entropy(shares_C)
    return 2 * (entropies - _entropy(joint_KC.ravel())) / entropies if entropies else 1.0


def adjusted_rand(counts_KC: Counts) -> float:
    """Pairs of images on which both agree, beyond chance: 1 for the same groups, about 0 for independent ones.

    With P(n) = n (n - 1) / 2 pairs of n images, the adjusted Rand index of Hubert & Arabie (1985, equation 5):

        (sum_kc P(n_kc) - E) / ((sum_k P(n_k) + sum_c P(n_c)) / 2 - E),  E = sum_k P(n_k) * sum_c P(n_c) / P(n)
    """
    together, in_cluster, in_class = (
        sum(math.comb(count, 2) for count in counts.ravel().tolist())
        for counts in (counts_KC, counts_KC.sum(axis=1), counts_KC.sum(axis=0))
    )
    expected = in_cluster * in_class / max(math.comb(int(counts_KC.sum()), 2), 1)
    largest = (in_cluster + in_class) / 2
    return (together - expected) / (largest - expected) if largest != expected else 1.0


def match(counts_KC: Counts) -> Counts:
    """The class of each cluster (K,), -1 for none, of the one-to-one matching with most images (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    clusters, classes = linear_sum_assignment(counts_KC, maximize=True)
    matched_K = np.full(len(counts_KC), -1, dtype=np.int64)
    matched_K[clusters] = classes
    return matched_K


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def cluster(features_ND: Tensor, labels_N: Tensor, *, num_classes: int, config: ClusteringConfig) -> Found:
    """The figures: means and spreads over runs, the interval of the accuracy over images."""
    require_finite(features_ND, task="Clustering")
    num_clusters = config.clusters or num_classes
    unit_ND = normalize(features_ND, dim=1)
    hits: list[Tensor] = []
    found: dict[str, list[float]] = {"matched_accuracy": [], "nmi": [], "ari": [], "mean_squared_distance": []}
    for run in counted(range(config.runs), f"k-means, {num_clusters} clusters", unit="run"):
        clusters_N, distance = k_means(
            unit_ND, num_clusters, iterations=config.iterations, restarts=config.restarts, seed=config.seed + run
        )
        counts_KC = contingency(clusters_N, labels_N, num_clusters=num_clusters, num_classes=num_classes)
        hits.append(torch.from_numpy(match(counts_KC))[clusters_N] == labels_N)
        found["matched_accuracy"].append(100.0 * hits[-1].double().mean().item())
        found["nmi"].append(100.0 * mutual_information(counts_KC))
        found["ari"].append(100.0 * adjusted_rand(counts_KC))
        found["mean_squared_distance"].append(distance)
    interval = mean_interval(100.0 * torch.stack(hits).double().mean(dim=0))
    titles = {"matched_accuracy": "matched accuracy", "nmi": "NMI", "ari": "ARI"}
    measures = tuple(
        Measure(
            name,
            title,
            mean(found[name]),
            interval=interval if name == "matched_accuracy" else None,
            spread=pstdev(found[name]) if config.runs > 1 else None,
        )
        for name, title in titles.items()
    )
    return Found(measures, {"by_run": found})


def evaluate_clustering(config: ClusteringConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    import faiss

    index = open_shards(config.images)
    require_labels(index, display_name(config.images), task="clustering", where="")
    classes, numbers_N = np.unique(labels_of(index), return_inverse=True)
    num_clusters = config.clusters or len(classes)
    if not 2 <= num_clusters <= len(index):
        raise ConfigError(
            f"Clustering needs between 2 clusters and one for each image ({len(index):,}). Got {num_clusters}; "
            f"{display_name(config.images)} has {len(classes)} classes."
        )
    labels_N = torch.from_numpy(numbers_N)
    model = open_model(config)
    print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)

    def measure(one: EvaluatedModel) -> Found:
        features_ND = features_of(config, one, index, name="all")
        return cluster(features_ND, labels_N, num_classes=len(classes), config=config)

    baselines = {
        name: (baseline, measure(baseline))
        for name, baseline in (baselines_of(model) if config.baselines else {}).items()
    }
    protocol = {
        **pass_protocol(config, model),
        "images": config.images,
        "images_fingerprint": index.fingerprint,
        "num_images": len(index),
        "num_classes": len(classes),
        "warnings": (),
    }
    settings: dict[str, JSON] = {
        "clusters": num_clusters,
        **config.model_dump(include={"iterations", "restarts", "runs", "seed"}),
        "features": "length 1",
        "faiss": faiss.__version__,
    }
    return Measured(model.label, measure(model), baselines, protocol), settings


def main(config: ClusteringConfig) -> None:
    measured, settings = evaluate_clustering(config)
    conclude(config, "clustering", measured, settings)


def command(name: str = "python -m eval.clustering") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(ClusteringConfig, main, command=name)

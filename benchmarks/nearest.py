"""k-NN classification of frozen features: DINO's evaluator, FAISS and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from ssl_pipeline.eval.knn import weighted_knn

# training images, queries
SIZES: dict[Size, tuple[int, int]] = {"tiny": (200, 50), "small": (50_000, 2_000), "large": (1_281_167, 10_000)}
DIM, CLASSES, K, TEMPERATURE = 384, 1000, 20, 0.07
SMALL_CALL = 64
DINO_CALL = 500  # a hundredth of ImageNet's validation images
SAME = 0.999  # share of queries whose first class must agree: ties and rounding aside all do


def compare_knn(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Queries per second, exact search and vote."""
    num_train, num_queries = SIZES[config.chosen_size()]
    device = config.torch_device()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    labels, query_labels = (torch.randint(CLASSES, (n,), generator=generator) for n in (num_train, num_queries))
    train, queries = (
        F.normalize(centres[own] + torch.randn(len(own), DIM, generator=generator), dim=1).to(device)
        for own in (labels, query_labels)
    )
    labels = labels.to(device)

    def ours(queries: Tensor) -> Tensor:
        return weighted_knn(train, labels, queries, k=K, temperature=TEMPERATURE, num_classes=CLASSES)

    expected = ours(queries[: min(num_queries, 200)]).argmax(dim=1)

    def contestant(name: str, scores: Callable[[Tensor], Tensor], note: str = "", *, part: int = 1) -> Contestant:
        agreement = (scores(queries[: len(expected)]).argmax(dim=1).to(device) == expected).float().mean().item()
        if agreement < SAME:
            raise ValueError(f"k-NN by {name} agrees with ours on {agreement:.1%} of the queries only")
        asked = queries[: max(num_queries // part, 1)]

        def unit(number: int) -> int:
            scores(asked)
            return len(asked)

        return Contestant(name, unit, note="; ".join(filter(None, (note, f"{agreement:.1%} of classes as ours"))))

    whole, small = _faiss(train, labels, call=num_queries), _faiss(train, labels, call=SMALL_CALL)
    contestants = [
        contestant("DINO's evaluator", _dino_evaluator(train, labels), f"{DINO_CALL} queries a call"),
        contestant("FAISS, small calls", small, f"flat index, {SMALL_CALL} queries a call", part=32),
        contestant("FAISS", whole, "flat index, one call"),
        contestant("ours", ours, "ssl_pipeline.eval.knn.weighted_knn"),
    ]
    setting = f"{num_train} x {DIM} training features, {num_queries} queries, k={K}"
    yield Comparison("knn", "queries", contestants, ("DINO's evaluator", "FAISS"), setting=setting)


def _dino_evaluator(train: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """eval_knn.py of https://github.com/facebookresearch/dino in its shape: chunks of queries, one-hot votes."""
    transposed = train.T

    def scores(queries: Tensor) -> Tensor:
        one_hot = torch.zeros(K * DINO_CALL, CLASSES, device=train.device)
        found = []
        for part in queries.split(DINO_CALL):
            similarities, neighbours = (part @ transposed).topk(K, largest=True, sorted=True)
            retrieved = labels.view(1, -1).expand(len(part), -1).gather(1, neighbours)
            votes = one_hot[: K * len(part)].zero_().scatter_(1, retrieved.view(-1, 1), 1)
            weights = (similarities / TEMPERATURE).exp_()
            found.append((votes.view(len(part), -1, CLASSES) * weights[..., None]).sum(dim=1))
        return torch.cat(found)

    return scores


def _faiss(train: Tensor, labels: Tensor, *, call: int) -> Callable[[Tensor], Tensor]:
    """FAISS's exact index on the CPU and a vote on what it finds."""
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(train.cpu().numpy())
    own_labels = labels.cpu()

    def scores(queries: Tensor) -> Tensor:
        answers = [index.search(np.ascontiguousarray(part.cpu().numpy()), K) for part in queries.split(call)]
        similarities, neighbours = (torch.from_numpy(np.concatenate(part)) for part in zip(*answers, strict=True))
        votes = torch.zeros(len(queries), CLASSES)
        return votes.scatter_add_(1, own_labels[neighbours], (similarities / TEMPERATURE).exp())

    return scores

"""The evaluators: k-NN beside DINO's and FAISS; the linear probe beside the extraction of its features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.images import SMALL, images_for
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.views import MEAN, STD
from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.knn import weighted_knn
from ssl_pipeline.eval.linear import ProbeConfig, choose, linear_probe
from ssl_pipeline.eval.linear_heads import stratified_split, train_linear_heads
from ssl_pipeline.eval.protocol import LabelledFeatures
from ssl_pipeline.machine import whole_cores

# training images, queries
NEIGHBOURS: dict[Size, tuple[int, int]] = {"tiny": (200, 50), "small": (50_000, 2_000), "large": (1_281_167, 10_000)}
DIM, CLASSES, K, TEMPERATURE = 384, 1000, 20, 0.07
SMALL_CALL, PART = 64, 32  # queries of a small call; share of them that is asked in small calls
DINO_CALL = 500  # a hundredth of ImageNet's validation images
SAME_CLASSES = 0.999  # share of queries whose first class must agree: ties and rounding aside all do

RATES = tuple(torch.logspace(-3, 1.5, 16).tolist())  # about the span of eval.linear's own
BATCH_SIZE = 256  # of the extraction; eval's default
SAME_HEADS = 1e-3  # largest relative gap between heads that are called the same, ...
SAME_EPOCHS = 3  # ... after so many epochs: large rates magnify rounding from one to the next


@dataclass(frozen=True)
class LinearSetting:
    """A backbone, the images that it sees, and the probes of its features."""

    backbone: BackboneConfig
    pixels: int
    num_images: int
    classes: tuple[int, ...] = (10, 100)
    epochs: int = ProbeConfig().epochs


LINEAR: dict[Size, LinearSetting] = {
    "tiny": LinearSetting(BackboneConfig(name="test_resnet"), 32, 8, classes=(2,), epochs=SAME_EPOCHS),
    "small": LinearSetting(BackboneConfig(name="resnet18", small_images=True), 32, 512),
    "large": LinearSetting(BackboneConfig(name="vit_small_patch16_224"), 224, 2048),
}


def compare_knn(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Queries per second, exact search and vote."""
    (num_train, num_queries), device = NEIGHBOURS[config.chosen_size()], config.torch_device()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    labels, query_labels = (torch.randint(CLASSES, (n,), generator=generator) for n in (num_train, num_queries))
    train, queries = (
        F.normalize(centres[own] + torch.randn(len(own), DIM, generator=generator), dim=1).to(device)
        for own in (labels, query_labels)
    )
    labels = labels.to(device)
    setting = f"{num_train} x {DIM} training features, {num_queries} queries, k={K}"
    comparison = Comparison("knn", "queries", setting, references=("DINO's evaluator", "FAISS"))

    ours = partial(weighted_knn, train, labels, k=K, temperature=TEMPERATURE, num_classes=CLASSES)
    expected = ours(queries[: min(num_queries, 200)]).argmax(dim=1)

    def add(name: str, scores: Callable[[Tensor], Tensor], note: str, *, asked: Tensor = queries) -> None:
        agreement = (scores(queries[: len(expected)]).argmax(dim=1).to(device) == expected).float().mean().item()
        if agreement < SAME_CLASSES:
            raise ValueError(f"k-NN by {name} agrees with ours on {agreement:.1%} of the queries only")
        comparison.add(name, lambda: len(scores(asked)), f"{note}; {agreement:.1%} of classes as ours")

    index = faiss.IndexFlatIP(DIM)
    index.add(train.cpu().numpy())
    by_faiss = partial(_faiss, index, labels.cpu())
    few = queries[: max(num_queries // PART, 1)]
    add("DINO's evaluator", partial(_dino_evaluator, train, labels), f"{DINO_CALL} queries a call")
    add("FAISS, small calls", partial(by_faiss, SMALL_CALL), f"flat index, {SMALL_CALL} queries a call", asked=few)
    add("FAISS", partial(by_faiss, num_queries), "flat index, one call")
    add("ours", ours, "ssl_pipeline.eval.knn.weighted_knn")
    yield comparison


def _dino_evaluator(train: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """eval_knn.py of https://github.com/facebookresearch/dino in its shape: chunks of queries, one-hot votes."""
    one_hot = torch.zeros(K * DINO_CALL, CLASSES, device=train.device)
    found = []
    for part in queries.split(DINO_CALL):
        similarities, neighbours = (part @ train.T).topk(K, largest=True, sorted=True)
        retrieved = labels.view(1, -1).expand(len(part), -1).gather(1, neighbours)
        votes = one_hot[: K * len(part)].zero_().scatter_(1, retrieved.view(-1, 1), 1)
        weights = (similarities / TEMPERATURE).exp_()
        found.append((votes.view(len(part), -1, CLASSES) * weights[..., None]).sum(dim=1))
    return torch.cat(found)


def _faiss(index: faiss.IndexFlatIP, labels: Tensor, call: int, queries: Tensor) -> Tensor:
    """FAISS's exact index on the CPU and a vote on what it finds."""
    answers = [index.search(np.ascontiguousarray(part.cpu().numpy()), K) for part in queries.split(call)]
    similarities, neighbours = (torch.from_numpy(np.concatenate(part)) for part in zip(*answers, strict=True))
    votes = torch.zeros(len(queries), CLASSES)
    return votes.scatter_add_(1, labels[neighbours], (similarities / TEMPERATURE).exp())


def compare_linear(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of extracting features, of extracting and probing them, and of probing alone, in which 16
    learning rates are trained at once or one by one.

    Alone, because a sweep may add less than one extraction differs from the next.
    """
    setting, device = LINEAR[config.chosen_size()], config.torch_device()
    images = images_for(config, setting.num_images, small=setting.pixels == min(SMALL))
    about = f"{setting.backbone.name}, {setting.pixels} pixels, {config.dtype()}; {len(RATES)} learning rates"
    about += f", {setting.epochs} epochs; {images.source}"
    comparison = Comparison("linear", "images", about, setting.num_images, ("extraction",))
    with images.in_shards() as shards:
        extract = partial(
            extract_features,
            create_backbone(setting.backbone).to(device),
            open_shards(shards),
            Preprocessing(setting.pixels, MEAN, STD),
            batch_size=BATCH_SIZE,
            workers=whole_cores(),  # as fast as the images can be read: a slow extraction would flatter the sweep
            device=device,
            precision="bf16" if config.autocasts() else "no",
        )
        features, _ = extract()
        comparison.add("extraction", extract)
        for count in setting.classes:
            labels = torch.arange(setting.num_images, device=device) % count
            sweep = partial(_sweep, labels, setting.epochs)
            one_by_one = partial(_one_by_one, features, labels, setting.epochs)
            comparison.add(f"extraction and sweep, {count} classes", partial(sweep, extract))
            note = "ssl_pipeline.eval.linear.linear_probe"
            comparison.add(f"sweep, {count} classes", partial(sweep, lambda: (features, None)), note)
            comparison.add(f"one by one, {count} classes", one_by_one, same_heads(features, labels))
        yield comparison


def _sweep(labels: Tensor, epochs: int, extract: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
    """What `python -m eval.linear` does: fit all rates on a part at once, choose on the rest, refit, test."""
    features, _ = extract()
    config = ProbeConfig(solver="sgd", learning_rates=RATES, weight_decays=(0.0,), epochs=epochs)
    data = LabelledFeatures(features, labels, features, labels, int(labels.max()) + 1)
    linear_probe(data, config, device=labels.device)


def _one_by_one(features: Tensor, labels: Tensor, epochs: int) -> None:
    """The same with a training for each rate."""
    features, fraction = features.to(labels.device), ProbeConfig().validation_fraction
    kept, held_out = (rows.to(labels.device) for rows in stratified_split(labels.cpu(), fraction=fraction, seed=0))

    def scores(rate: float, rows: Tensor, test: Tensor) -> Tensor:
        weights, biases = _heads(features[rows], labels[rows], (rate,), epochs)
        return test @ weights[0] + biases[0]

    best, _ = choose((scores(rate, kept, features[held_out]) for rate in RATES), labels[held_out])
    every = torch.arange(len(labels), device=labels.device)
    top_k_accuracy(scores(RATES[best], every, features).cpu(), labels.cpu())


def same_heads(features: Tensor, labels: Tensor) -> str:
    """A note that both ways train the same heads, once that is seen; raises ValueError if they do not."""
    heads_for = partial(_heads, features.to(labels.device), labels, epochs=SAME_EPOCHS)
    together, alone = heads_for(RATES)[0], torch.cat([heads_for((rate,))[0] for rate in RATES])
    gap = max(((one - other).norm() / other.norm()).item() for one, other in zip(together, alone, strict=True))
    if gap > SAME_HEADS:
        raise ValueError(f"The linear heads at once and one by one differ by {gap:.1e}: not the same work")
    return f"the same heads as at once after {SAME_EPOCHS} epochs"


def _heads(features: Tensor, labels: Tensor, rates: tuple[float, ...], epochs: int) -> tuple[Tensor, Tensor]:
    train = partial(train_linear_heads, features, labels, num_classes=int(labels.max()) + 1, epochs=epochs, seed=0)
    return train(learning_rates=rates, weight_decays=(0.0,) * len(rates), batch_size=ProbeConfig().sgd_batch_size)

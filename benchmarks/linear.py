"""The linear probe beside the extraction of its features: 16 learning rates trained at once, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.hardware import num_cores
from benchmarks.images import load_images, write_shards
from benchmarks.input import PHOTOGRAPH, SMALL
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.torchvision_views import MEAN, STD
from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.linear import ProbeConfig, choose, linear_probe
from ssl_pipeline.eval.linear_heads import stratified_split, train_linear_heads

RATES = tuple(torch.logspace(-3, 1.5, 16).tolist())  # about the span of eval.linear's own
BATCH_SIZE = 256  # of the extraction; eval's default
SAME = 1e-3  # largest relative gap between heads that are called the same, ...
SAME_EPOCHS = 3  # ... after so many epochs: large rates magnify rounding from one to the next


@dataclass(frozen=True)
class LinearSetting:
    """A backbone, the images that it sees, and the probes of its features."""

    backbone: BackboneConfig
    pixels: int
    num_images: int
    classes: tuple[int, ...] = (10, 100)
    epochs: int = ProbeConfig().epochs


SETTINGS: dict[Size, LinearSetting] = {
    "tiny": LinearSetting(BackboneConfig(name="test_resnet"), 32, 8, classes=(2,), epochs=SAME_EPOCHS),
    "small": LinearSetting(BackboneConfig(name="resnet18", small_images=True), 32, 512),
    "large": LinearSetting(BackboneConfig(name="vit_small_patch16_224"), 224, 2048),
}


def compare_linear(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of extracting features, of extracting and probing them, and of probing alone.

    Alone, because a sweep may add less than one extraction differs from the next.
    """
    setting, device = SETTINGS[config.chosen_size()], config.torch_device()
    small = setting.pixels == min(SMALL)
    source = load_images(config.cifar10 if small else config.imagenet, pixels=SMALL if small else PHOTOGRAPH)
    images = source.spread_out(setting.num_images)
    with TemporaryDirectory() as folder:
        shards = write_shards(images, Path(folder) / "shards")
        extract = partial(
            extract_features,
            create_backbone(setting.backbone).to(device),
            open_shards(shards),
            Preprocessing(setting.pixels, MEAN, STD),
            batch_size=BATCH_SIZE,
            workers=num_cores(),  # as fast as the images can be read: a slow extraction would flatter the sweep
            device=device,
            precision="bf16" if config.autocast() else "no",
        )

        def contestant(name: str, work: Callable[[], object], note: str = "") -> Contestant:
            def unit(number: int) -> int:
                work()
                return setting.num_images

            return Contestant(name, unit, note=note)

        features, _ = extract()
        contestants = [contestant("extraction", extract)]
        for num_classes in setting.classes:
            probe = Probe(torch.arange(setting.num_images) % num_classes, num_classes, setting.epochs, device)
            whole = partial(_extract_and_probe, extract, probe)
            contestants += [
                contestant(f"extraction and sweep, {num_classes} classes", whole),
                contestant(
                    f"sweep, {num_classes} classes",
                    partial(probe.sweep, features),
                    "ssl_pipeline.eval.linear.linear_probe",
                ),
                contestant(
                    f"one by one, {num_classes} classes", partial(probe.one_by_one, features), probe.agree(features)
                ),
            ]
        dtype = "bf16 autocast" if config.autocast() else "float32"
        about = f"{setting.backbone.name}, {setting.pixels} pixels, {dtype}; {len(RATES)} learning rates"
        yield Comparison(
            "linear",
            "images",
            contestants,
            references=("extraction",),
            setting=f"{about}, {setting.epochs} epochs; {images.source}",
        )


def _extract_and_probe(extract: Callable[[], tuple[Tensor, Tensor]], probe: Probe) -> None:
    probe.sweep(extract()[0])


@dataclass(frozen=True)
class Probe:
    """Chooses among the learning rates for features (N, D) of images with `labels` (N,), in two ways."""

    labels: Tensor
    num_classes: int
    epochs: int
    device: torch.device

    def sweep(self, features: Tensor) -> None:
        """What `python -m eval.linear` does: fit all rates on a part at once, choose on the rest, refit, test."""
        config = ProbeConfig(solver="sgd", learning_rates=RATES, weight_decays=(0.0,), epochs=self.epochs)
        linear_probe(
            features,
            self.labels,
            features,
            self.labels,
            num_classes=self.num_classes,
            config=config,
            device=self.device,
        )

    def one_by_one(self, features: Tensor) -> None:
        """The same with a training for each rate."""
        features, labels = features.to(self.device), self.labels.to(self.device)
        fraction = ProbeConfig().validation_fraction
        kept, held_out = (rows.to(self.device) for rows in stratified_split(self.labels, fraction=fraction, seed=0))

        def scores(rate: float, train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
            weights, biases = self._heads(train, train_labels, (rate,), epochs=self.epochs)
            return test @ weights[0] + biases[0]

        candidates = (scores(rate, features[kept], labels[kept], features[held_out]) for rate in RATES)
        best, _ = choose(candidates, labels[held_out])
        top_k_accuracy(scores(RATES[best], features, labels, features).cpu(), self.labels)

    def agree(self, features: Tensor) -> str:
        """A note that both ways train the same heads, once that is seen."""
        features, labels = features.to(self.device), self.labels.to(self.device)
        together, _ = self._heads(features, labels, RATES, epochs=SAME_EPOCHS)
        alone = torch.cat([self._heads(features, labels, (rate,), epochs=SAME_EPOCHS)[0] for rate in RATES])
        gap = max(((one - other).norm() / other.norm()).item() for one, other in zip(together, alone, strict=True))
        if gap > SAME:
            raise ValueError(f"The linear heads at once and one by one differ by {gap:.1e}: not the same work")
        return f"the same heads as at once after {SAME_EPOCHS} epochs"

    def _heads(
        self, features: Tensor, labels: Tensor, rates: tuple[float, ...], *, epochs: int
    ) -> tuple[Tensor, Tensor]:
        return train_linear_heads(
            features,
            labels,
            learning_rates=rates,
            weight_decays=(0.0,) * len(rates),
            num_classes=self.num_classes,
            epochs=epochs,
            batch_size=ProbeConfig().sgd_batch_size,
            seed=0,
        )

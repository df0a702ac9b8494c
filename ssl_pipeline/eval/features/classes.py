"""What a run's own classifier says about images: class probabilities, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.backbones.classifier import classifier_of_run
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.eval.features.extract import forward_passes
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import ModelConfig, open_model
from ssl_pipeline.eval.features.passes import ForwardConfig, choose_device
from ssl_pipeline.files import JSON


class RunClassifierConfig(ForwardConfig):
    """The classifier of a run whose method learns one, and how images go through it."""

    run: Path
    """A run's directory: its newest backbone and classifier are taken, exported or in a checkpoint."""
    step: Annotated[int, Field(gt=0)] | None = None
    """The step to take, exported or in a checkpoint, instead of the newest."""
    size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Side of the images in pixels; by default the run's evaluation size."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, antialiased in either way."""


@dataclass(frozen=True)
class OpenedClassifier:
    """A frozen network, images (B, 3, S, S) -> logits (B, classes), with what its images need.

    class_names: None where the run's labelled images had none. `about` is JSON that identifies it.
    """

    network: nn.Module
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None
    label: str
    about: dict[str, JSON]

    def names_beside(self, others: Sequence[str] | None) -> tuple[str, ...]:
        """What the classes are called: as `others` where the run knew no names, otherwise by their numbers."""
        known = self.class_names or others or ()
        return tuple(known[number] if number < len(known) else str(number) for number in range(self.num_classes))


def open_classifier(config: RunClassifierConfig) -> OpenedClassifier:
    """Raises ConfigError if there is no such run or step, or if its method does not train a classifier."""
    model = open_model(
        ModelConfig(run=config.run, step=config.step, size=config.size, interpolation=config.interpolation)
    )
    step = model.about["step"]  # of the backbone: a run that still trains may have a newer one by now
    classifier, names = classifier_of_run(config.run, step=step if isinstance(step, int) else None)
    features = getattr(model.backbone, "embed_dim", None)
    if features != classifier.in_features:
        raise ConfigError(
            f"run={config.run} has a classifier of {classifier.in_features} features but a backbone of {features}. "
            "Take a run whose files belong together."
        )
    network = nn.Sequential(model.backbone, classifier)
    about = {**model.about, "num_classes": classifier.out_features}
    return OpenedClassifier(network, model.preprocessing, classifier.out_features, names, model.label, about)


def class_probabilities(
    opened: OpenedClassifier,
    index: ShardIndex,
    config: ForwardConfig,
    *,
    description: str,
    samples: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Probabilities (B, classes) float32 of each batch of images in the order of `index`, on the CPU.

    samples: those that are wanted, by their numbers, if not all are.
    """
    device = choose_device(config.device)
    with forward_passes(
        FeatureKinds(opened.network.to(device)),
        index,
        range(len(index)) if samples is None else samples,
        opened.preprocessing,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        precision=config.precision,
        description=description,
    ) as batches:
        for output, _ in batches:
            yield output["pooled"].float().softmax(dim=1).cpu()

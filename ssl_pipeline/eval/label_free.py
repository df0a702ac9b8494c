"""What the features of a backbone show without labels, from some images and random views of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.augment.multi_crop import MultiCrop
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import ConfigError, InRange, PlaceText, Seed, printable
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.eval.features.extract import Change
from ssl_pipeline.eval.features.models import EvaluatedModel, baselines_of, open_model
from ssl_pipeline.eval.features.passes import features_in_memory
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import bootstrap_interval
from ssl_pipeline.eval.labelled import evenly_spread, look_at_first, say
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.protocol import Measured, ReportConfig, conclude, pass_protocol
from ssl_pipeline.eval.spectra import FEWEST_EIGENVALUES, alignment, alpha_req, feature_std, lidar, rankme, uniformity
from ssl_pipeline.files import JSON

WITHOUT_CHANGE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std of views that the pass normalises

# Axes: N images, Q views of each, D feature dimensions.


class LabelFreeConfig(ReportConfig):
    """RankMe, alpha-ReQ, LiDAR, uniformity, alignment and deviation of a backbone's features; needs no labels."""

    images: PlaceText
    """Images, labelled or not: shards, or a folder or a zip, which is packed once."""
    num_images: Annotated[int, Field(ge=FEWEST_EIGENVALUES + 1, le=10**6)] = 2048
    """How many of them are taken, evenly spread, or all if there are fewer; more images than dimensions tell more."""
    views: Annotated[int, Field(ge=2, le=1000)] = 2
    """Random views of each image for LiDAR and alignment. LiDAR is steadier with more."""
    crop_scale: Annotated[tuple[float, float], InRange(gt=0, le=1, increasing=True)] = (0.2, 1.0)
    """Smallest and largest area of a view, as a fraction of the evaluation view; colours change as in DINO's views."""
    seed: Seed = 0
    """Seed of the views."""


@dataclass(frozen=True)
class RandomView:
    """Random view number `view` of the pixels of evaluation: cropped and resized, flipped, its colours changed."""

    multi_crop: MultiCrop
    view: int

    def __call__(self, pixels_BCHW: Tensor, ids_B: Tensor, device: torch.device) -> Tensor:
        views = self.multi_crop(pixels_BCHW, ids_B, epoch=self.view, device=str(device))["view"]
        return views[0].mul_(255)


def measure_label_free(features_ND: Tensor, views_NQD: Tensor) -> Found:
    """All figures, of the features of N images and of those of Q views of each.

    RankMe, alpha-ReQ and the deviation are of the images as evaluators see them; LiDAR, uniformity (its mean over the
    first two views) and alignment (its mean over all pairs of views) are of the views, as their papers have them.
    """
    rank = rankme(features_ND)
    aligned_N = torch.stack(
        [
            alignment(views_NQD[:, first], views_NQD[:, second])
            for first, second in combinations(range(views_NQD.shape[1]), 2)
        ]
    ).mean(dim=0)
    even = sum(uniformity(views_NQD[:, view]) for view in (0, 1)) / 2
    measures = [
        Measure("rankme", "RankMe", rank, unit=""),
        Measure("rankme_percent", "RankMe, of the largest possible", 100.0 * rank / min(features_ND.shape)),
        *_alpha(features_ND),
        Measure("lidar", "LiDAR", lidar(views_NQD), unit=""),
        Measure("feature_std", "feature deviation (1: even)", feature_std(features_ND), unit=""),
        Measure("uniformity", "uniformity (lower: more even)", even, unit=""),
        Measure(
            "alignment",
            "alignment (lower: nearer views)",
            aligned_N.mean().item(),
            unit="",
            interval=bootstrap_interval(aligned_N),
        ),
    ]
    return Found(tuple(measures), {})


def _alpha(features_ND: Tensor) -> list[Measure]:
    """alpha-ReQ, or nothing where features have too few dimensions that differ."""
    try:
        return [Measure("alpha", "alpha-ReQ", alpha_req(features_ND), unit="")]
    except ValueError as error:
        say([str(error)])
        return []


def evaluate_label_free(config: LabelFreeConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    index = open_shards(config.images)
    samples = evenly_spread(index, config.num_images)
    if len(samples) <= FEWEST_EIGENVALUES:
        raise ConfigError(
            f"Measures without labels need {FEWEST_EIGENVALUES + 1} images or more. {index.called} has {len(samples)}."
        )
    model = open_model(config)
    look_at_first(index, model.preprocessing.size, sample=samples[0])
    print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)
    baselines = {
        name: (baseline, _measure(config, baseline, index, samples))
        for name, baseline in (baselines_of(model) if config.baselines else {}).items()
    }
    found = _measure(config, model, index, samples)
    protocol = {
        **pass_protocol(config, model),
        "images": config.images,
        "images_fingerprint": index.fingerprint,
        "num_images": len(samples),
        "warnings": (),
    }
    settings = config.model_dump(include={"views", "crop_scale", "seed"}, mode="json")
    return Measured(model.label, found, baselines, protocol), settings


def _measure(config: LabelFreeConfig, model: EvaluatedModel, index: ShardIndex, samples: list[int]) -> Found:
    size, (mean, std) = model.preprocessing.size, WITHOUT_CHANGE
    group = ViewGroup(count=1, size=size, scale=config.crop_scale, interpolation=model.preprocessing.interpolation)
    multi_crop = MultiCrop({"view": group}, mean=mean, std=std, seed=config.seed)

    def features(what: str, change: Change | None) -> Tensor:
        description = f"{model.label}, {what}"
        return features_in_memory(config, model, index, description=description, samples=samples, change=change)

    views = [features(f"view {view + 1}", RandomView(multi_crop, view)) for view in range(config.views)]
    return measure_label_free(features("images", None), torch.stack(views, dim=1))


def main(config: LabelFreeConfig) -> None:
    measured, settings = evaluate_label_free(config)
    conclude(config, "label_free", measured, settings)


def command(name: str = "python -m eval.label_free") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(LabelFreeConfig, main, command=name)

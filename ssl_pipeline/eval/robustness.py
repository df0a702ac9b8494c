"""k-NN accuracy on corrupted test images: five corruptions at five severities, made during the feature pass.

The protocol of ImageNet-C (Hendrycks & Dietterich, 2019, https://arxiv.org/abs/1903.12261), where nothing has seen the
corruptions: the neighbours are clean training images, whose features come from the cache.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import Seed, printable
from ssl_pipeline.eval.accuracy import top_k_hits
from ssl_pipeline.eval.corruptions import CORRUPTIONS, SEVERITIES, Corrupt, Corruption, strengths_for
from ssl_pipeline.eval.features.models import EvaluatedModel, baselines_of, open_model
from ssl_pipeline.eval.features.passes import choose_device, features_in_memory
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import mean_interval
from ssl_pipeline.eval.knn import weighted_knn
from ssl_pipeline.eval.labelled import LabelledImages, evenly_spread, open_labelled
from ssl_pipeline.eval.measures import Found, Measure, format_table, percent
from ssl_pipeline.eval.protocol import EvaluationConfig, Measured, conclude, features_of, protocol_of
from ssl_pipeline.eval.search.neighbours import require_k, search_device
from ssl_pipeline.files import JSON

CLEAN = "clean"

# Axes: M training images, N test images, V severities, D feature dimensions.


class RobustnessConfig(EvaluationConfig):
    """k-NN accuracy on test images that are corrupted, against clean training images."""

    corruptions: tuple[Corruption, ...] = Field(CORRUPTIONS, min_length=1)
    """What is done to the test images, each at five severities, which are five feature passes over them."""
    num_test: Annotated[int, Field(gt=0)] | None = None
    """At most this many test images, evenly spread; by default all of them."""
    k: Annotated[int, Field(gt=0)] = 20
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(similarity / temperature)."""
    seed: Seed = 0
    """Seed of the noise."""


def evaluate_robustness(config: RobustnessConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    images = open_labelled(config.train, config.test, task="robustness")
    require_k(config.k, len(images.train))
    model = open_model(config)
    benchmark, strengths = strengths_for(model.preprocessing.size)  # of the baselines too, whatever their size
    samples = evenly_spread(images.test, config.num_test or len(images.test))
    print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)

    def measure(one: EvaluatedModel) -> Found:
        bank_MD = features_of(config, one, images.train, name="training")
        hits = {CLEAN: [_hits(config, one, images, samples, bank_MD, None)]}
        for corruption in config.corruptions:
            hits[corruption] = [
                _hits(config, one, images, samples, bank_MD, Corrupt(corruption, strength, config.seed))
                for strength in strengths[corruption]
            ]
        return summarise({name: torch.stack(of_severity) for name, of_severity in hits.items()})

    baselines = {
        name: (baseline, measure(baseline))
        for name, baseline in (baselines_of(model) if config.baselines else {}).items()
    }
    settings: dict[str, JSON] = {
        **config.model_dump(include={"corruptions", "k", "temperature", "seed"}),
        "strengths": benchmark,
        "measured": len(samples),
    }
    return Measured(model.label, measure(model), baselines, protocol_of(config, model, images)), settings


def _hits(
    config: RobustnessConfig,
    model: EvaluatedModel,
    images: LabelledImages,
    samples: list[int],
    bank_MD: Tensor,
    change: Corrupt | None,
) -> Tensor:
    """Whether each of the test images (N,) is recognised by its clean neighbours."""
    device = choose_device(config.device)
    what = CLEAN if change is None else f"{change.corruption} {change.strength}"
    description = f"{model.label}, {what}"
    features_ND = features_in_memory(
        config, model, images.test, description=description, samples=samples, change=change
    )
    place = search_device(bank_MD, features_ND, device)
    scores_NC = weighted_knn(
        normalize(bank_MD.to(place), dim=1),
        images.train_labels,
        normalize(features_ND.to(place), dim=1),
        k=config.k,
        temperature=config.temperature,
        num_classes=images.num_classes,
    )
    return top_k_hits(scores_NC.cpu(), images.test_labels[samples], k=1)


def summarise(hits: dict[str, Tensor]) -> Found:
    """Means over severities, and over corruptions and severities, from hits (V, N); those of `clean` are one row."""
    corrupted = {name: of_severity for name, of_severity in hits.items() if name != CLEAN}
    rows = {"mean_corrupted": torch.cat(list(corrupted.values())), **hits}
    titles = {"mean_corrupted": "top-1, mean over corruptions", CLEAN: "top-1, clean"}
    measures = []
    for name, of_severity in rows.items():
        values_N = 100.0 * of_severity.double().mean(dim=0)
        called = titles.get(name, f"top-1, {name.replace('_', ' ')}")
        interval = mean_interval(values_N)
        measures.append(Measure(f"top1_{name}", called, values_N.mean().item(), interval=interval))
    by_severity = {name: (100.0 * of_severity.double().mean(dim=1)).tolist() for name, of_severity in corrupted.items()}
    return Found(tuple(measures), {"by_severity": by_severity})


def severity_table(by_severity: dict[str, list[float]]) -> str:
    """A row for each corruption, a column for each severity."""
    rows = [[name.replace("_", " "), *map(percent, values)] for name, values in by_severity.items()]
    return format_table(["top-1 by severity", *map(str, SEVERITIES)], rows)


def main(config: RobustnessConfig) -> None:
    measured, settings = evaluate_robustness(config)
    print(severity_table(measured.result.details["by_severity"]) + "\n")  # type: ignore[arg-type]
    conclude(config, "robustness", measured, settings)


def command(name: str = "python -m eval.robustness") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(RobustnessConfig, main, command=name)

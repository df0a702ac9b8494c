"""Linear probe: the accuracy of the best linear classifier on frozen features, chosen without the test images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.backbones.tokens import NETWORKS_WITH_TOKENS
from ssl_pipeline.config import BatchSize, Config, ConfigError, Seed
from ssl_pipeline.eval.accuracy import ByClass, by_class, top_k_accuracy
from ssl_pipeline.eval.classes import classes_json, print_classes
from ssl_pipeline.eval.features.kinds import Kind
from ssl_pipeline.eval.features.models import EvaluatedModel, open_model
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.eval.labelled import open_labelled, say
from ssl_pipeline.eval.linear_heads import logistic_regression, stratified_split, train_linear_heads
from ssl_pipeline.eval.linear_inputs import TOKEN_KINDS, inputs_of
from ssl_pipeline.eval.measures import format_table, percent, with_interval
from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.protocol import (
    EvaluationConfig,
    LabelledFeatures,
    last_blocks_of,
    measure_models,
    open_models,
    write_report,
)
from ssl_pipeline.eval.results import CLASSIFIERS
from ssl_pipeline.files import JSON

LARGEST_LOGISTIC = 4_000_000  # numbers in the training features up to which `solver=auto` takes L-BFGS: a minute or so

ABOUT_SOLVER = {
    "sgd": "SGD, momentum 0.9, cosine to zero, heads start at zero, features as they are, no augmentation",
    "logistic": "scikit-learn's L-BFGS logistic regression on standardised features, no augmentation",
}

Number = float | str
Setting = dict[str, float]
ScoresOf = Callable[[Tensor, Tensor, Tensor, list[Setting]], Iterator[Tensor]]
"""Training features, their labels, other features, settings -> class scores (N, C) of the others, per setting."""

Positive = Annotated[float, Field(gt=0)]


class ProbeConfig(Config):
    """The settings that the probe tries, and how it trains them."""

    solver: Literal["auto", "sgd", "logistic"] = "auto"
    """`logistic` is scikit-learn's L-BFGS, `sgd` the sweep; `auto` takes logistic for up to 4 million training
    features (images * dimensions) of the widest of the networks that are measured together."""
    learning_rates: tuple[Positive, ...] = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
    """`sgd`: learning rates for 256 images, all trained at once; the rate in use is this * sgd_batch_size / 256."""
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-4)
    """`sgd`: weight decays, each with every learning rate."""
    epochs: Annotated[int, Field(gt=0, le=10**6)] = 100
    """`sgd`: passes over the training features; the learning rate falls to zero along a cosine."""
    sgd_batch_size: BatchSize = 1024
    """`sgd`: images per step."""
    inverse_penalties: tuple[Positive, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """`logistic`: values of scikit-learn's C."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of every class of the training set that the settings are chosen on."""
    seed: Seed = 0
    """Seed of the validation split and of the order of the batches."""


class LinearConfig(EvaluationConfig, ProbeConfig):
    """Linear-probe accuracy of frozen features: a run's backbone, or a timm model."""

    inputs: Literal["pooled", "tokens"] = "pooled"
    """What is classified. pooled: the network's own features. tokens: of a ViT the class token of the last block or
    those of the last four, with or without the mean of the last patches, each with every setting (DINOv2's sweep)."""


@dataclass(frozen=True)
class ProbeResult:
    """Percent on the test images, of the setting that was best on the validation split, retrained on everything.

    Where each class has one training image nothing can be held out: it is the middle setting, and NaN on validation.
    """

    top1: float
    top5: float
    solver: str
    chosen: dict[str, Number]
    """The setting, and with several inputs which one (`input`)."""
    validation_top1: float
    sweep: list[dict[str, Number]]


def linear_probe(
    features: LabelledFeatures, config: ProbeConfig, *, device: torch.device | str = "cpu"
) -> tuple[ProbeResult, Tensor]:
    """Fit every setting on a part of the training features, choose on the rest, refit on all, test once.

    Each input that `inputs_of` makes of the features is tried with every setting. Equal validation accuracies are
    decided by the validation loss. With one image of each class the middle setting is taken, of the first input.
    Returns the class scores (N, C) of the test images too. Raises ConfigError if features are not finite or if every
    setting diverges.
    """
    inputs, num_classes = inputs_of(features), features.num_classes
    if not all(part.isfinite().all() for both in inputs.values() for part in both):
        raise ConfigError("The linear probe needs finite features. Some have NaN or infinity.")
    if len(features.train_labels.unique()) < 2:
        raise ConfigError("The linear probe needs two classes or more in the training set. Got one.")
    solver = solver_for(config, max(train.numel() for train, _ in inputs.values()))
    settings, scores_of = (_logistic if solver == "logistic" else _sgd)(config, num_classes)
    train_labels = features.train_labels.to(device)
    kept, held_out = (
        rows.to(device)
        for rows in stratified_split(train_labels.cpu(), fraction=config.validation_fraction, seed=config.seed)
    )

    def candidates() -> Iterator[Tensor]:
        for train, _ in inputs.values():
            train = train.to(device)
            yield from scores_of(train[kept], train_labels[kept], train[held_out], settings)

    tried = [(name, setting) for name in inputs for setting in settings]
    unseen = len(train_labels.unique()) - len(train_labels[held_out].unique())
    if len(held_out) and unseen:
        say([f"{unseen} classes have one training image: the settings are chosen on images of the other classes."])
    if len(held_out):
        best, accuracies = choose(candidates(), train_labels[held_out])
    else:
        say(["Each class has one training image, so no setting could be chosen: the middle one is taken."])
        best, accuracies = len(settings) // 2, [math.nan] * len(tried)
    name, setting = tried[best]
    train, test = (part.to(device) for part in inputs[name])
    scores = next(scores_of(train, train_labels, test, [setting])).cpu()

    def described(name: str, setting: Setting) -> dict[str, Number]:
        return {"input": name, **setting} if len(inputs) > 1 else {**setting}

    result = ProbeResult(
        **top_k_accuracy(scores, features.test_labels.cpu()),
        solver=solver,
        chosen=described(name, setting),
        validation_top1=accuracies[best],
        sweep=[
            {**described(*one), "validation_top1": accuracy} for one, accuracy in zip(tried, accuracies, strict=True)
        ],
    )
    return result, scores


def solver_for(config: ProbeConfig, numbers: int) -> Literal["sgd", "logistic"]:
    """What trains on training features of this many numbers."""
    if config.solver != "auto":
        return config.solver
    return "logistic" if numbers <= LARGEST_LOGISTIC else "sgd"


def choose(candidates: Iterable[Tensor], labels: Tensor) -> tuple[int, list[float]]:
    """The number of the best of several class scores (N, C), and the top-1 accuracy of each.

    The highest accuracy wins, then the lowest cross-entropy. Scores with NaN come last.
    """
    accuracies, losses = [], []
    for scores_NC in candidates:
        accuracies.append(top_k_accuracy(scores_NC, labels)["top1"])
        losses.append(cross_entropy(scores_NC, labels).nan_to_num(nan=torch.inf).item())
    best = max(range(len(losses)), key=lambda number: (accuracies[number], -losses[number]))
    if losses[best] == torch.inf and accuracies[best] == 0.0:
        raise ConfigError(
            f"Every setting of the linear probe diverged ({len(losses)} tried). Try smaller learning_rates."
        )
    return best, accuracies


def _sgd(config: ProbeConfig, num_classes: int) -> tuple[list[Setting], ScoresOf]:
    def scores_of(features: Tensor, labels: Tensor, test: Tensor, settings: list[Setting]) -> Iterator[Tensor]:
        weights, biases = train_linear_heads(
            features,
            labels,
            learning_rates=[setting["learning_rate"] for setting in settings],
            weight_decays=[setting["weight_decay"] for setting in settings],
            num_classes=num_classes,
            epochs=config.epochs,
            batch_size=config.sgd_batch_size,
            seed=config.seed,
        )
        for weight, bias in zip(weights, biases, strict=True):  # one at a time: together they may not fit
            yield test @ weight + bias

    return [
        {"learning_rate": rate, "weight_decay": decay}
        for rate, decay in product(config.learning_rates, config.weight_decays)
    ], scores_of


def _logistic(config: ProbeConfig, num_classes: int) -> tuple[list[Setting], ScoresOf]:
    def scores_of(features: Tensor, labels: Tensor, test: Tensor, settings: list[Setting]) -> Iterator[Tensor]:
        for setting in counted(settings, "logistic regression", unit="setting"):
            scores = logistic_regression(
                features, labels, test, inverse_penalty=setting["inverse_penalty"], num_classes=num_classes
            )
            yield scores.to(labels.device)

    return [{"inverse_penalty": penalty} for penalty in config.inverse_penalties], scores_of


def evaluate_linear(config: LinearConfig) -> dict[str, JSON]:
    """The linear-probe report of the config's model, as written to `eval/linear.json`, with tables on stdout."""

    def measure(features: LabelledFeatures) -> tuple[ProbeResult, ByClass]:
        result, scores_NC = linear_probe(features, config, device=choose_device(config.device))
        return result, by_class(scores_NC.argmax(dim=1), features.test_labels, num_classes=features.num_classes)

    images = open_labelled(config.train, config.test, task="the linear probe")
    kinds: tuple[Kind, ...] = TOKEN_KINDS if config.inputs == "tokens" else ()
    models = open_models(config)
    _require_inputs(config, models.model)
    widest = max(_widest_input(one, kinds) for one in (models.model, *models.baselines.values()))
    config = config.model_copy(update={"solver": solver_for(config, len(images.train) * widest)})  # one for all of them
    measured = measure_models(config, images, measure, kinds=kinds, models=models)
    num_test, names = len(images.test), images.class_names
    rows = [
        [
            label,
            with_interval(result.top1, num_test),
            percent(result.top5),
            percent(classes.balanced),
            percent(result.validation_top1),
            _plain(result),
        ]
        for label, (result, classes) in measured.rows()
    ]
    title = CLASSIFIERS[measured.result[0].solver]
    print(format_table([title, "top-1", "top-5", "balanced", "validation top-1", "chosen"], rows))
    result, classes = measured.result
    print("\n" + sweep_table(result))
    print_classes(f"{title}, {measured.label}", classes, names)
    settings = linear_settings(config, result.solver, inputs=config.inputs)
    return measured.report(lambda found: linear_json(found[0], num_test, found[1], names), settings)


def _widest_input(model: EvaluatedModel, kinds: tuple[Kind, ...]) -> int:
    """Numbers of the widest input: the class tokens of the last blocks and the mean of the patches."""
    if kinds and isinstance(model.backbone, TokenBackbone):
        return model.backbone.token_dim * (last_blocks_of(model.backbone) + 1)
    return model.width


def linear_settings(config: ProbeConfig, solver: str, *, inputs: str = "pooled") -> dict[str, JSON]:
    """The probe's part of the protocol."""
    import sklearn

    return {
        "solver": solver,
        "inputs": inputs,
        "about": ABOUT_SOLVER[solver],
        "selection": (
            f"best top-1 on a stratified {100 * config.validation_fraction:g} % of the training images, "
            "then retrained on all of them"
        ),
        **config.model_dump(include=set(ProbeConfig.model_fields) - {"solver"}, mode="json"),
        "scikit-learn": sklearn.__version__,
    }


def linear_json(result: ProbeResult, num_test: int, classes: ByClass, names: Sequence[str]) -> dict[str, JSON]:
    """One model's part of the report of the linear probe."""
    interval = share_interval(result.top1, num_test)
    return {**asdict(result), "top1_interval": interval, "by_class": classes_json(classes, names)}


def sweep_table(result: ProbeResult) -> str:
    """One row per setting that was tried, measured on the held-out training images; `*` marks the chosen one."""
    rows = [
        [
            ("* " if all(tried[name] == value for name, value in result.chosen.items()) else "  ")
            + " / ".join(_short(tried[name]) for name in result.chosen),
            percent(float(tried["validation_top1"])),
        ]
        for tried in result.sweep
    ]
    names = " / ".join(name.replace("_", " ") for name in result.chosen)
    return format_table([f"  {names}", "validation top-1"], rows)


def _plain(result: ProbeResult) -> str:
    return f"{result.solver}, " + ", ".join(f"{name} {_short(value)}" for name, value in result.chosen.items())


def _short(value: Number) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _require_inputs(config: LinearConfig, model: EvaluatedModel) -> None:
    if config.inputs == "tokens" and not isinstance(model.backbone, TokenBackbone):
        raise ConfigError(
            f"inputs=tokens needs a network with tokens. '{getattr(model.backbone, 'name', model.label)}' has none; "
            f"take inputs=pooled. Networks with tokens: {NETWORKS_WITH_TOKENS}."
        )


def main(config: LinearConfig) -> None:
    write_report(config, "linear", evaluate_linear(config))


def command(name: str = "python -m eval.linear") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(
        LinearConfig, main, command=name, check=lambda config: _require_inputs(config, open_model(config))
    )

"""All measures of a backbone from one feature pass, in one table with its baselines, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from ssl_pipeline.config import printable
from ssl_pipeline.distributed import process_group, rank
from ssl_pipeline.eval.accuracy import ByClass
from ssl_pipeline.eval.classes import classes_json, print_classes
from ssl_pipeline.eval.features.models import baselines_of, open_model
from ssl_pipeline.eval.few_shot import FewShotConfig, few_shot, few_shot_settings, fitted
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.eval.knn import VotesConfig, knn_json, knn_settings
from ssl_pipeline.eval.labelled import LabelledImages, open_labelled, say
from ssl_pipeline.eval.linear import linear_json, linear_settings
from ssl_pipeline.eval.measures import Found, Measure, format_table, measures_json, percent, with_interval
from ssl_pipeline.eval.protocol import (
    EvaluationConfig,
    LabelledFeatures,
    Measured,
    Result,
    conclude,
    model_features,
    protocol_of,
    write_report,
)
from ssl_pipeline.eval.results import CLASSIFIERS
from ssl_pipeline.eval.retrieval import RetrievalConfig, require_enough, retrieval_settings, retrieve
from ssl_pipeline.eval.search.neighbours import require_k
from ssl_pipeline.eval.suite_measures import SuiteConfig, SuiteResult, measure_all
from ssl_pipeline.files import JSON

Evaluate = Callable[[LabelledFeatures], Found]
PROBES = ("sgd", "logistic")


def evaluate_suite(config: SuiteConfig) -> Measured[SuiteResult] | None:
    """Print the table and write `eval/suite.json`, `knn.json` and `linear.json`; with torchrun the first process does.

    The features of all models are computed first, by all processes.
    """
    images = open_labelled(config.train, config.test, task="the suite")
    config = config.model_copy(update={"k": _fitting(config.k, len(images.train))})
    others = _others(config, images)
    model = open_model(config)
    baselines = baselines_of(model) if config.baselines else {}
    with process_group():
        if rank() == 0:
            print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)
        features = {name: model_features(config, one, images) for name, one in {"": model, **baselines}.items()}
        if rank() > 0:
            return None
    protocol = protocol_of(config, model, images)

    def measure(evaluate: Callable[[LabelledFeatures], Result]) -> Measured[Result]:
        found = {name: (one, evaluate(features[name])) for name, one in baselines.items()}
        return Measured(model.label, evaluate(features[""]), found, protocol)

    measured = measure(lambda of_model: measure_all(of_model, config))
    _print(measured, config, images)
    _write(measured, config, images)
    for evaluator, (evaluate, settings) in others.items():
        print()
        conclude(config, evaluator, measure(evaluate), settings)
    return measured


def _others(config: SuiteConfig, images: LabelledImages) -> dict[str, tuple[Evaluate, dict[str, JSON]]]:
    """What `also` asks for, each with its part of the protocol; ConfigError for what these images do not allow."""
    shared = {name: getattr(config, name) for name in EvaluationConfig.model_fields}
    found: dict[str, tuple[Evaluate, dict[str, JSON]]] = {}
    if "few_shot" in config.also:
        of_few = fitted(FewShotConfig(**shared), images)
        found["few_shot"] = (lambda features: few_shot(features, of_few)), few_shot_settings(of_few)
    if "retrieval" in config.also:
        of_retrieval = RetrievalConfig(**shared)
        require_enough(of_retrieval, images)
        found["retrieval"] = (lambda features: retrieve(features, of_retrieval)), retrieval_settings(of_retrieval)
    return found


def _fitting(k: tuple[int, ...], num_train: int) -> tuple[int, ...]:
    """Those of `k` that are possible, with a warning; ConfigError if none is."""
    fitting = tuple(count for count in k if count <= num_train)
    if not fitting:
        require_k(min(k), num_train)
    if left_out := [str(count) for count in k if count > num_train]:
        say([f"k={','.join(left_out)} is left out: there are {num_train} training images."])
    return fitting


def _print(measured: Measured[SuiteResult], config: SuiteConfig, images: LabelledImages) -> None:
    header, rows = table(measured, config, len(images.test))
    print(format_table(header, rows))
    best, found = headline(measured.result)
    print_classes(f"{title(best, config)}, {measured.label}", found, images.class_names)


def headline(result: SuiteResult) -> tuple[str, ByClass]:
    """The classifier whose classes are shown: the first linear one."""
    name = next(iter(result.probes))
    return name, result.classes[name]


def title(name: str, config: VotesConfig) -> str:
    return f"k-NN, k={config.k[0]}" if name == "knn" else CLASSIFIERS[name]


def table(measured: Measured[SuiteResult], config: SuiteConfig, num_test: int) -> tuple[list[str], list[list[str]]]:
    """A column for each model, a row for each measure; the interval next to each top-1."""
    models = measured.rows()
    rows = [
        [
            f"k-NN top-1, k={k}" + (f", temperature {temperature:g}" if len(config.temperatures) > 1 else ""),
            *(with_interval(result.knn[temperature][k]["top1"], num_test) for _, result in models),
        ]
        for temperature in config.temperatures
        for k in config.k
    ]
    for solver in PROBES:
        if solver in measured.result.probes:
            found = [result.probes.get(solver) for _, result in models]
            cells = ["-" if probe is None else with_interval(probe.top1, num_test) for probe in found]
            rows.append([f"{CLASSIFIERS[solver]} top-1", *cells])
    for name in measured.result.classes:
        balanced = [result.classes[name].balanced if name in result.classes else None for _, result in models]
        rows.append([f"{title(name, config)}, balanced", *(percent(value) for value in balanced)])
    rows.append(["RankMe", *(f"{result.rankme:.1f} ({result.rankme_percent:.0f} %)" for _, result in models)])
    rows.append(["alpha-ReQ", *("-" if result.alpha is None else f"{result.alpha:.2f}" for _, result in models)])
    return ["", *(label for label, _ in models)], rows


def _write(measured: Measured[SuiteResult], config: SuiteConfig, images: LabelledImages) -> None:
    num_test, names = len(images.test), images.class_names
    first = shared_probe(measured)
    settings: dict[str, JSON] = {"knn": knn_settings(config), "linear": linear_settings(config, first)}
    report = measured.report(lambda result: _to_json(result, config, num_test, names, first), settings)
    shown: dict[str, JSON] = {
        "neighbours": asdict(measured.result.neighbours),
        "fingerprints": {"train": images.train.fingerprint, "test": images.test.fingerprint},
    }
    write_report(config, "suite", {**report, **shown})
    of_knn = measured.report(lambda result: knn_json(config, result.knn, num_test), knn_settings(config))
    write_report(config, "knn", of_knn)
    linear = measured.report(
        lambda result: linear_json(result.probes[first], num_test, result.classes[first], names),
        linear_settings(config, first),
    )
    write_report(config, "linear", linear)


def shared_probe(measured: Measured[SuiteResult]) -> str:
    """The first linear classifier that all networks have: pixels may be too wide for the one that the network has."""
    return next(name for name in measured.result.probes if all(name in result.probes for _, result in measured.rows()))


def _to_json(
    result: SuiteResult, config: SuiteConfig, num_test: int, names: Sequence[str], first: str
) -> dict[str, JSON]:
    return {
        "measures": measures_json(_own_measures(result)),
        "top1": result.probes[first].top1,
        "top1_interval": share_interval(result.probes[first].top1, num_test),
        "knn": knn_json(config, result.knn, num_test),
        **{name: linear_json(probe, num_test, result.classes[name], names) for name, probe in result.probes.items()},
        "rankme": result.rankme,
        "rankme_percent": result.rankme_percent,
        "alpha": result.alpha,
        "by_class": {name: classes_json(found, names) for name, found in result.classes.items()},
    }


def _own_measures(result: SuiteResult) -> list[Measure]:
    """What is in no other report."""
    measures = [
        Measure(f"balanced_accuracy_{name}", f"balanced accuracy, {CLASSIFIERS[name]}", found.balanced)
        for name, found in result.classes.items()
    ]
    measures += [
        Measure("rankme", "RankMe", result.rankme, unit=""),
        Measure("rankme_percent", "RankMe, of the largest possible", result.rankme_percent),
    ]
    return measures + ([] if result.alpha is None else [Measure("alpha", "alpha-ReQ", result.alpha, unit="")])


def main(config: SuiteConfig) -> None:
    evaluate_suite(config)


def command(name: str = "python -m eval.suite") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(SuiteConfig, main, command=name, shared=True)

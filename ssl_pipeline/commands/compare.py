"""Several recipes, several seeds, one table: how good each method's backbone is at the same budget.

It is here because it combines two rooms that do not import each other: pretraining and evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Self

from pydantic import Field, model_validator

from ssl_pipeline.commands.before_packing import check_outline
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.commands.process import key_of, run_pretraining, with_defaults
from ssl_pipeline.commands.recipe_choice import AUTO
from ssl_pipeline.config import COMPARISONS, RECIPES, Config, ConfigError, Seed, load, run_command
from ssl_pipeline.config.output_file import Folder, require_writable
from ssl_pipeline.data.shards.listing import list_shards
from ssl_pipeline.data_tools.split_labels import SplitLabels, split_labels_once
from ssl_pipeline.eval.differences import interval_of, runs_within_interval
from ssl_pipeline.eval.images import with_shards
from ssl_pipeline.eval.intervals import Interval
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn
from ssl_pipeline.eval.labelled import open_labelled
from ssl_pipeline.eval.linear import LinearConfig, evaluate_linear
from ssl_pipeline.eval.measures import format_table, percent
from ssl_pipeline.eval.protocol import write_report
from ssl_pipeline.eval.results import differing, own_sizes
from ssl_pipeline.eval.search.neighbours import require_k
from ssl_pipeline.eval.table import MODELS, WITH_BASELINES, read_run, titles_of, top1_of
from ssl_pipeline.files import JSON, write_json, write_text

OF_A_RUN = re.compile(r"\{output\}/([^/]+)-seed")  # by what a run names an earlier one
COURSES = {"knn_top1": "k-NN", "classifier_top1": "own classifier"}
CURVE_POINTS = 6

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Evaluator -> model -> top-1 in percent, one per seed."""


class CompareConfig(Config):
    """Pretrain several recipes with several seeds and measure all of them, at the end of each run, in one table.

    Runs that are there already, in whole or in part, are reused or resumed. In arguments and in `train` {seed} and
    {output} are those of the comparison, and {labels} the labelled images that the seed has drawn: a run may begin from
    one that is listed before it, `backbone.weights={output}/NAME-seed{seed}`.
    """

    recipe: str | None = None
    """The comparison that these settings come from: a name in recipes/comparisons/, or a path to a YAML file."""
    recipes: tuple[str, ...] = ()
    """Recipes to compare as they are: `recipes=digits_dino,digits_simclr`."""
    runs: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Runs with arguments of their own, by name: `runs.short='[recipe=digits_dino, train.epochs=5]'`."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """One run of each recipe for each seed."""
    settings: tuple[str, ...] = ()
    """Arguments for every run without its own: `settings=train.epochs=5,knn=null`, or a list in brackets."""
    draw_from: str | None = None
    """Shards from which each seed draws its own labelled images, {labels}: OUTPUT/labelsN-seedS."""
    labels_per_class: Annotated[int, Field(ge=1)] | None = None
    """With draw_from: how many of each class."""
    train: str
    """Labelled training images, which k-NN and the linear probe learn from: shards, or a folder or zip of class
    folders."""
    test: str
    """Labelled test images of the same classes, likewise."""
    output: Folder
    """Directory for the runs (NAME-seedN), compare.json and compare.txt."""
    k: Annotated[int, Field(gt=0)] = 20
    """Neighbours of k-NN."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of k-NN."""

    @model_validator(mode="after")
    def _has_runs_of_its_own_seeds(self) -> Self:
        if not self.recipes and not self.runs:
            raise ValueError("there is nothing to compare: set recipes=NAME,NAME or runs.NAME=[recipe=..., ...].")
        for name, arguments in self.runs.items():
            if "recipe" not in map(key_of, arguments):
                raise ValueError(f"runs.{name} must name a recipe: [recipe=NAME, ...]. Got {list(arguments)}.")
        if (self.draw_from is None) != (self.labels_per_class is None):
            raise ValueError(
                "draw_from says what labelled images are drawn from and labels_per_class how many. Set both."
            )
        everything = (*self.settings, self.train, *(argument for run in self.runs.values() for argument in run))
        if self.draw_from is None and any("{labels}" in argument for argument in everything):
            raise ValueError("{labels} needs draw_from=SHARDS and labels_per_class=N.")
        doubled = [name for name in self.recipes if name in self.runs]
        if doubled:
            raise ValueError(f"'{doubled[0]}' is in recipes and in runs; give the run another name.")
        for key, arguments in (
            ("settings", self.settings),
            *((f"runs.{name}", run) for name, run in self.runs.items()),
        ):
            reserved = ("seed", "output") if key != "settings" else ("recipe", "seed", "output")
            taken = [argument for argument in arguments if key_of(argument) in reserved]
            if taken:
                raise ValueError(f"{key} must leave {' and '.join(reserved)} to eval.compare. Got '{taken[0]}'.")
        return self

    def arguments(self) -> dict[str, list[str]]:
        """The arguments of each run, by its name: its own, and those of `settings` whose keys it does not have."""
        own = {recipe: (f"recipe={recipe}",) for recipe in self.recipes} | self.runs
        return {name: with_defaults(run, self.settings) for name, run in own.items()}


@dataclass(frozen=True)
class Comparison:
    """What was measured: top-1 in percent by run and evaluator, and its course during the runs."""

    top1: dict[str, Scores]
    classifier: dict[str, list[float]]
    """Of methods that learn to classify: the last top-1 of their own classifier, one per seed."""
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    """Metric of a monitor -> run that has this monitor -> epoch and top-1 during training, mean over seeds."""
    titles: dict[str, dict[str, str]]
    """Run -> evaluator -> what it is called: linear classifiers have two protocols."""
    intervals: dict[str, dict[str, Interval]]
    """Run -> evaluator -> interval of its top-1 over the test images, mean over seeds."""
    protocols: dict[str, list[str]] = field(default_factory=dict)
    """Evaluator -> settings in which the protocols of the runs of one seed differ, where they do."""
    sizes: str = ""
    """That networks were measured at different sizes, each at its own: a sentence."""


def compare(config: CompareConfig, pretrain: Callable[[Sequence[str]], None] = run_pretraining) -> Comparison:
    """Run and measure everything; `pretrain` runs one list of arguments."""
    found = Comparison({}, {}, {metric: {} for metric in COURSES}, {}, {})
    protocols: dict[tuple[str, int], dict[str, dict[str, JSON]]] = {
        (evaluator, seed): {} for evaluator in WITH_BASELINES for seed in config.seeds
    }
    for name, arguments in config.arguments().items():
        scores: dict[str, dict[str, list[float]]] = {key: {model: [] for model in MODELS} for key in WITH_BASELINES}
        intervals: dict[str, list[Interval]] = {key: [] for key in WITH_BASELINES}
        rows = []
        for seed in config.seeds:
            run, fill = config.output / f"{name}-seed{seed}", _filling(config, seed)
            pretrain([*map(fill, arguments), f"seed={seed}", f"output={run}"])
            _evaluate(config, run, train=fill(config.train))
            reports = read_run(run)
            top1 = top1_of(reports, run)
            for evaluator in WITH_BASELINES:
                protocols[evaluator, seed][run.name] = reports[evaluator]["protocol"]
                for model in MODELS:
                    scores[evaluator][model].append(top1[evaluator][model])
                if (interval := interval_of(reports[evaluator])) is not None:
                    intervals[evaluator].append(interval)
            found.titles[name] = titles_of(reports)
            rows.append(_read_metrics(run))
        found.top1[name] = scores
        found.intervals[name] = {
            evaluator: (mean(low for low, _ in of_seeds), mean(high for _, high in of_seeds))
            for evaluator, of_seeds in intervals.items()
            if of_seeds
        }
        found.classifier[name] = [row[-1]["classifier_top1"] for row in rows if row and "classifier_top1" in row[-1]]
        for metric, curves in found.curves.items():
            if course := _course(rows, metric):
                curves[name] = course
    for (evaluator, _), of_runs in protocols.items():  # of one seed: another may have drawn other labels
        if evaluator not in found.protocols and (lines := differing(of_runs)):
            found.protocols[evaluator] = lines
    sizes = next(filter(None, map(own_sizes, protocols.values())), "")
    return replace(found, sizes=sizes)


def summary(found: Comparison, seeds: int) -> str:
    """One row per run and evaluator: raw pixels, random initialisation, pretrained; mean and spread over seeds."""
    rows = []
    for name, scores in found.top1.items():
        for evaluator in WITH_BASELINES:
            rows.append(
                (name, found.titles[name][evaluator], *(_mean_and_spread(scores[evaluator][model]) for model in MODELS))
            )
        if found.classifier[name]:
            rows.append((name, "own classifier top-1", "-", "-", _mean_and_spread(found.classifier[name])))
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        format_table(("run", "", *MODELS.values()), rows),
        "",
        f"Top-1 of the last step, never of the best one; {spread}.",
    ]
    lines += _near(found)
    lines += [found.sizes] if found.sizes else []
    for metric, curves in found.curves.items():
        if curves:
            lines += [
                "",
                f"{COURSES[metric]} top-1 in percent during the runs, as its monitor measured it (epoch: top-1):",
            ]
            lines += [f"  {name}: {_curve(points)}" for name, points in curves.items()]
    for evaluator, settings in found.protocols.items():
        lines += [
            "",
            f"warning: The protocols of eval.{evaluator} differ, so its figures say less about the methods:",
        ]
        lines += [f"  {setting}" for setting in settings]
    return "\n".join(lines)


def _near(found: Comparison) -> list[str]:
    """For each protocol the runs that do not differ from the best one."""
    ranked: dict[str, dict[str, tuple[float, Interval | None]]] = {}
    for name, scores in found.top1.items():
        for evaluator in WITH_BASELINES:
            own = mean(scores[evaluator]["pretrained"]), found.intervals[name].get(evaluator)
            ranked.setdefault(found.titles[name][evaluator], {})[name] = own
    return [line for title, runs in ranked.items() for line in runs_within_interval(title, runs)]


def _read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of the run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _course(rows: Sequence[Sequence[Mapping[str, float]]], metric: str) -> list[tuple[float, float]]:
    """Each epoch in which all seeds have the metric, and its mean over them; rows: the logged ones, by seed."""
    courses = [{row["epoch"]: row[metric] for row in seed_rows if metric in row} for seed_rows in rows]
    measured_in_all = sorted(set.intersection(*map(set, courses)))
    return [(epoch, mean(course[epoch] for course in courses)) for epoch in measured_in_all]


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """At most CURVE_POINTS of the points, spread evenly, the last one among them."""
    count = min(len(points), CURVE_POINTS)
    chosen = [points[(number + 1) * len(points) // count - 1] for number in range(count)]
    return "  ".join(f"{epoch:.3g}: {top1:.1f}" for epoch, top1 in chosen)


def _filling(config: CompareConfig, seed: int) -> Callable[[str], str]:
    """Fills in {seed}, {output} and {labels}; draws the labels if they are not there."""
    stands_for = {"{seed}": str(seed), "{output}": str(config.output)}
    if config.draw_from is not None:
        drawn = config.output / f"labels{config.labels_per_class}-seed{seed}"
        stands_for["{labels}"] = str(drawn)
        split_labels_once(
            SplitLabels(shards=config.draw_from, output=drawn, labels_per_class=config.labels_per_class, seed=seed)
        )

    return partial(_filled, stands_for=stands_for)


def _filled(text: str, stands_for: Mapping[str, str]) -> str:
    for token, value in stands_for.items():
        text = text.replace(token, value)
    return text


def _evaluate(config: CompareConfig, run: Path, *, train: str) -> None:
    """Write the run's eval/knn.json and eval/linear.json."""
    knn = KnnConfig(
        run=run, train=train, test=config.test, baselines=True, k=(config.k,), temperature=config.temperature
    )
    write_report(knn, "knn", evaluate_knn(knn))
    linear = LinearConfig(run=run, train=train, test=config.test, baselines=True)
    write_report(linear, "linear", evaluate_linear(linear))


def _mean_and_spread(values: Sequence[float]) -> str:
    return percent(mean(values)) + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def checked(config: CompareConfig) -> CompareConfig:
    """The same settings on shards, once all that can be checked before a run is: the settings of each, the images to
    measure by and on, and k. Raises ConfigError; what a run before makes or a draw is not looked for.
    """
    before = list[str]()
    for name, arguments in config.arguments().items():
        try:
            _check_run(config, arguments, before)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        before.append(name)
    fixed = tuple(key for key in ("train", "test") if "{" not in getattr(config, key))
    config = with_shards(config, config.output, keys=fixed)
    if "train" in fixed:
        require_k(config.k, len(open_labelled(config.train, config.test, task="k-NN").train))
    return config


def _check_run(config: CompareConfig, arguments: Sequence[str], before: Sequence[str]) -> None:
    """Raise ConfigError for settings that no run can have, a network that cannot be, and images that are not there."""
    if "images" in map(key_of, arguments) or f"recipe={AUTO}" in arguments:
        return  # looked at when its turn comes
    for argument in arguments:
        unknown = [name for name in OF_A_RUN.findall(argument) if name not in before]
        if unknown:
            listed = ", ".join(before) or "none"
            raise ConfigError(f"{argument} is of no run that is listed before this one ({listed}): '{unknown[0]}'.")
    tokens = {"{output}": str(config.output), "{seed}": str(config.seeds[0])}
    settings = load(PretrainConfig, [_filled(argument, tokens) for argument in arguments], recipes=RECIPES)
    if any("{output}" in argument for argument in arguments):
        return  # what an earlier run makes is not there yet
    check_outline(settings)
    labelled = None if settings.data.labelled is None else settings.data.labelled.shards
    for shards in (settings.data.shards, labelled):
        if shards is not None and "{labels}" not in str(shards) and "://" not in str(shards):
            list_shards(shards)


def main(config: CompareConfig) -> None:
    require_writable(config.output, key=f"output={config.output}")
    config = checked(config)
    found = compare(config)
    text = summary(found, len(config.seeds))
    print(text)
    report: JSON = {**asdict(found), "protocol": config.model_dump(mode="json")}
    write_json(config.output / "compare.json", report)
    write_text(config.output / "compare.txt", text + "\n")
    print(f"written to {config.output}/compare.json and compare.txt")


def command(name: str = "python -m eval.compare") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(CompareConfig, main, command=name, recipes=COMPARISONS)

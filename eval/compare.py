"""Several recipes, several seeds, one table: what each method's backbone is worth at the same budget."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

from pydantic import Field

from eval.evaluation import write_report
from eval.knn import KnnConfig, evaluate_knn
from eval.linear import LinearConfig, evaluate_linear
from eval.table import EVALUATORS, SUBJECTS, format_table, percent, read_top1
from ssl_pipeline.atomic import JSON, write_json, write_text
from ssl_pipeline.config import Config, ConfigError, RunError, run_command

PRETRAIN = Path(__file__).parents[1] / "pretrain.py"

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Evaluator -> subject -> top-1 in percent, one per seed."""


class CompareConfig(Config):
    """Pretrain several recipes with several seeds and measure all of them, at the end of each run, in one table.

    Runs that are there already, in whole or in part, are reused or resumed.
    """

    recipes: tuple[str, ...] = Field(min_length=1)
    """Recipes to compare: `recipes=digits_dino,digits_simclr`."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """One run of each recipe for each seed."""
    settings: tuple[str, ...] = ()
    """Arguments for every run: `settings=train.epochs=5,knn=null`, or a list in brackets if one holds a comma."""
    train: str
    """Shards of labelled training images."""
    test: str
    """Shards of labelled test images, with the same classes."""
    output: Path
    """Directory for the runs (RECIPE-seedN), compare.json and compare.txt."""
    k: Annotated[int, Field(gt=0)] = 20
    """Neighbours of k-NN."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of k-NN."""


def run_pretraining(arguments: Sequence[str]) -> None:
    """`pretrain.py` as a process of its own; RunError if it fails."""
    process = subprocess.run([sys.executable, str(PRETRAIN), *arguments], check=False)
    if process.returncode:
        raise RunError(f"pretrain.py {' '.join(arguments)} ended with exit code {process.returncode}; see above.")


def compare(config: CompareConfig, pretrain: Callable[[Sequence[str]], None] = run_pretraining) -> dict[str, Scores]:
    """Top-1 of each recipe by evaluator and subject, one value per seed; `pretrain` runs one list of arguments."""
    taken = [setting for setting in config.settings if setting.partition("=")[0] in ("recipe", "seed", "output")]
    if taken:
        raise ConfigError(f"settings must leave recipe, seed and output to eval.compare. Got '{taken[0]}'.")
    found: dict[str, Scores] = {}
    for recipe in config.recipes:
        scores: dict[str, dict[str, list[float]]] = {name: {subject: [] for subject in SUBJECTS} for name in EVALUATORS}
        for seed in config.seeds:
            run = config.output / f"{recipe}-seed{seed}"
            pretrain([f"recipe={recipe}", f"seed={seed}", f"output={run}", *config.settings])
            _evaluate(config, run)
            for name, top1 in read_top1(run).items():
                for subject in SUBJECTS:
                    scores[name][subject].append(top1[subject])
        found[recipe] = scores
    return found


def summary(found: Mapping[str, Scores], seeds: int) -> str:
    """One row per recipe and evaluator: raw pixels, random initialisation, pretrained; mean and spread over seeds."""
    rows = [
        (recipe, EVALUATORS[name], *(_mean_and_spread(scores[name][subject]) for subject in SUBJECTS))
        for recipe, scores in found.items()
        for name in EVALUATORS
    ]
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    table = format_table(("recipe", "", *SUBJECTS.values()), rows)
    return f"{table}\n\nTop-1 of the last step, never of the best one; {spread}."


def _evaluate(config: CompareConfig, run: Path) -> None:
    """Write the run's eval/knn.json and eval/linear.json."""
    knn = KnnConfig(
        run=run, train=config.train, test=config.test, baselines=True, k=(config.k,), temperature=config.temperature
    )
    write_report(knn, "knn", evaluate_knn(knn))
    linear = LinearConfig(run=run, train=config.train, test=config.test, baselines=True)
    write_report(linear, "linear", evaluate_linear(linear))


def _mean_and_spread(values: Sequence[float]) -> str:
    return percent(mean(values)) + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def main(config: CompareConfig) -> None:
    found = compare(config)
    text = summary(found, len(config.seeds))
    print(text)
    report: JSON = {"top1": found, "protocol": config.model_dump(mode="json")}
    write_json(config.output / "compare.json", report)
    write_text(config.output / "compare.txt", text + "\n")
    print(f"written to {config.output}/compare.json and compare.txt")


if __name__ == "__main__":
    sys.exit(run_command(CompareConfig, main, command="python -m eval.compare"))

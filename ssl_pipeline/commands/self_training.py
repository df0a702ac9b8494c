"""Self-training in rounds: a teacher labels images, a student learns them under noise and is the next teacher.

Noisy Student (Xie et al., 2019, https://arxiv.org/abs/1911.04252). It is here because it combines pretraining,
labelling and evaluation, which do not import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ssl_pipeline.commands.process import key_of, run_pretraining, with_defaults
from ssl_pipeline.config import SELF_TRAINING, Config, Seed, run_command
from ssl_pipeline.config.output_file import Folder
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data_tools.pseudo_label import Counts, PseudoLabelImages, keep_file, pseudo_label_once
from ssl_pipeline.data_tools.split_labels import SplitLabels, split_labels_once
from ssl_pipeline.eval.classifier import ClassifierConfig, evaluate_classifier
from ssl_pipeline.eval.measures import format_table, percent, with_interval
from ssl_pipeline.eval.protocol import write_report_to
from ssl_pipeline.files import JSON, write_json, write_text

TEACHER = "teacher"
OWN_KEYS = ("seed", "output", "data.shards", "data.labelled.shards", "data.labelled.keep", "data.labelled.labels")


class SelfTrainingConfig(Config):
    """Train a teacher on few labels, let it label the other images, and train students on both, round by round.

    Each student is new. Runs, labels and figures that exist already are used as they are, and a run that was
    interrupted goes on: the same command again goes on as a whole.
    """

    recipe: str | None = None
    """What these settings come from: a name in recipes/self_training/, or a path to a YAML file."""
    shards: str
    """Shards of all images; only the labels of the known ones are used."""
    labels_per_class: Annotated[int, Field(ge=1)] | None = None
    """How many images of each class are known, drawn by `seed`: OUTPUT/known.npy."""
    known: Path | None = None
    """Or which images are known: a file for data.keep, as split_labels writes it."""
    test: str
    """Shards of labelled test images, with the same classes."""
    teacher: tuple[str, ...] = Field(min_length=1)
    """Arguments of the first run: `[recipe=NAME, ...]`, of a method that learns to classify from data.labelled."""
    student: tuple[str, ...] = ()
    """Arguments for every later run without its own: with noise."""
    students: dict[str, tuple[str, ...]] = Field(min_length=1)
    """The later runs by name, in their order, with arguments of their own: as large as their teacher or larger."""
    settings: tuple[str, ...] = ()
    """Arguments for every run without its own."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """As in data_tools.pseudo_label."""
    soft: bool = True
    """As in data_tools.pseudo_label."""
    per_class: Annotated[int, Field(ge=1)] | Literal["smallest"] | None = None
    """As in data_tools.pseudo_label."""
    seed: Seed = 0
    """Seed of all runs, and of the known images."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Processes that read images for labelling and for measuring."""
    output: Folder
    """Directory for the runs (by name), the labels (NAME.npy), self_training.json and self_training.txt."""

    @model_validator(mode="after")
    def _runs_leave_what_is_not_theirs(self) -> Self:
        if (self.labels_per_class is None) == (self.known is None):
            raise ValueError("exactly one of labels_per_class=N and known=FILE.npy must be given.")
        if TEACHER in self.students:
            raise ValueError(f"students.{TEACHER} has the name of the first run; give it another one.")
        for name, arguments in self.arguments().items():
            taken = [argument for argument in arguments if key_of(argument) in OWN_KEYS]
            if taken:
                raise ValueError(f"{name} must leave {', '.join(OWN_KEYS)} to eval.self_training. Got '{taken[0]}'.")
            if "recipe" not in map(key_of, arguments):
                raise ValueError(f"{name} must name a recipe: [recipe=NAME, ...]. Got {arguments}.")
        return self

    def arguments(self) -> dict[str, list[str]]:
        """The arguments of each run, by its name, the teacher first; without labels, seed and output."""
        students = {name: with_defaults(own, self.student) for name, own in self.students.items()}
        return {name: with_defaults(own, self.settings) for name, own in {TEACHER: self.teacher, **students}.items()}


@dataclass(frozen=True)
class Round:
    """One run: the labels that it learnt (of guessed images: how many, and percent right if known), and its figures."""

    name: str
    known: int
    guessed: int
    right: float | None
    report: dict[str, JSON]


def self_training(
    config: SelfTrainingConfig, pretrain: Callable[[Sequence[str]], None] = run_pretraining
) -> list[Round]:
    """Run and measure all rounds; `pretrain` runs one list of arguments."""
    known = _known(config)
    labels = [f"data.labelled.keep={known}"]
    counts: Counts | None = None
    rounds: list[Round] = []
    names = list(config.arguments())
    for number, (name, arguments) in enumerate(config.arguments().items()):
        run = config.output / name
        shards = [f"data.shards={config.shards}", f"data.labelled.shards={config.shards}"]
        pretrain([*arguments, *shards, *labels, f"seed={config.seed}", f"output={run}"])
        measured = ClassifierConfig(run=run, test=config.test, workers=config.workers)
        report = evaluate_classifier(measured)
        write_report_to(run, "classifier", report)
        rounds.append(_round(name, counts, report, known))
        if number + 1 < len(names):
            file = config.output / f"{names[number + 1]}.npy"
            counts = pseudo_label_once(_labelling(config, run, known, file))
            labels = [f"data.labelled.keep={keep_file(file)}", f"data.labelled.labels={file}"]
    return rounds


def summary(rounds: Sequence[Round]) -> str:
    """One row for each run: what it learnt from, and its figures."""
    header = ("run", "known", "guessed", "of these right", "top-1", "balanced", "ECE")
    return format_table(header, [_row(found) for found in rounds])


def _row(found: Round) -> tuple[str, ...]:
    numbers = {name: found.report[name] for name in ("top1", "balanced_accuracy", "ece")}
    protocol = found.report["protocol"]
    assert isinstance(protocol, dict)
    top1 = with_interval(float(str(numbers["top1"])), int(protocol["num_test"]))
    others = (percent(float(str(numbers[name]))) for name in ("balanced_accuracy", "ece"))
    return (found.name, f"{found.known:,}", f"{found.guessed:,}", percent(found.right), top1, *others)


def _round(name: str, counts: Counts | None, report: dict[str, JSON], known: Path) -> Round:
    if counts is None:
        return Round(name, len(np.load(known, mmap_mode="r", allow_pickle=False)), 0, None, report)
    return Round(name, int(counts.known.sum()), int(counts.taken.sum()), counts.right, report)


def _known(config: SelfTrainingConfig) -> Path:
    """The file of the known images, drawn if that is asked for and they are not there yet.

    Raises DataError if what is in the output has learnt others. Those of another file than `known` was are refused by
    pretraining, which knows its labelled images.
    """
    drawn, taught = config.output / "known.npy", (config.output / TEACHER).exists()
    if config.known is not None:
        if drawn.exists():
            raise DataError(
                f"{drawn} was drawn for the runs of this output, and now known={config.known} is given. Set "
                "labels_per_class as it was to go on, or choose another output."
            )
        return config.known
    if taught and not drawn.exists():
        raise DataError(
            f"{config.output / TEACHER} has learnt the images of a file known=FILE.npy, and now "
            f"labels_per_class={config.labels_per_class} is given. Set known as it was to go on, or choose another "
            "output."
        )
    drawn.parent.mkdir(parents=True, exist_ok=True)
    split_labels_once(
        SplitLabels(shards=config.shards, output=drawn, labels_per_class=config.labels_per_class, seed=config.seed)
    )
    return drawn


def _labelling(config: SelfTrainingConfig, run: Path, known: Path, output: Path) -> PseudoLabelImages:
    return PseudoLabelImages(
        run=run,
        shards=config.shards,
        known=known,
        output=output,
        threshold=config.threshold,
        soft=config.soft,
        per_class=config.per_class,
        workers=config.workers,
    )


def main(config: SelfTrainingConfig) -> None:
    rounds = self_training(config)
    text = summary(rounds)
    print(text)
    report: JSON = {"rounds": [asdict(found) for found in rounds], "protocol": config.model_dump(mode="json")}
    write_json(config.output / "self_training.json", report)
    write_text(config.output / "self_training.txt", text + "\n")
    print(f"written to {config.output}/self_training.json and self_training.txt")


def command(name: str = "python -m eval.self_training") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(SelfTrainingConfig, main, command=name, recipes=SELF_TRAINING)

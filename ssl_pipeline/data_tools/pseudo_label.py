"""What a run's classifier says about images, as labels for another run: Noisy Student's step between two rounds.

python -m data_tools.pseudo_label run=DIR shards=DIR output=FILE.npy [threshold=0.3] [soft=true] [per_class=N]

Xie et al., 2019, https://arxiv.org/abs/1911.04252: a teacher in evaluation mode, on images without augmentation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ssl_pipeline.config import printable, run_command
from ssl_pipeline.config.output_file import OutputFile
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.overlay import Labels
from ssl_pipeline.data.subset import open_subset, write_keep, write_labels
from ssl_pipeline.eval.features.classes import (
    OpenedClassifier,
    RunClassifierConfig,
    class_probabilities,
    open_classifier,
)
from ssl_pipeline.files import JSON

# Axes: N images of the set, G of them that are guessed, C classes.


class PseudoLabelImages(RunClassifierConfig, OutputFile):
    """Label images by the classifier that a run has learnt, for another run to learn from.

    Nothing is copied: FILE.npy holds labels for data.labelled.labels, FILE.keep.npy the numbers of the images that have
    one, for data.labelled.keep. Soft labels are rows of probabilities (N, C) float32, of zeros where there is none.
    """

    suffixes = (".npy",)

    shards: str
    """Directory of shards, or a pattern such as DIR/train-*.tar; their own labels are ignored."""
    keep: Path | None = None
    """Label only these images of the shards, as data.keep."""
    known: Path | None = None
    """Images whose labels in the shards are right and stay, as data.keep: the FILE.npy of split_labels."""
    output: Path
    """FILE.npy, with FILE.keep.npy next to it."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Smallest probability of a class that makes it a label (Noisy Student: 0.3)."""
    soft: bool = True
    """Whether all probabilities are kept, or only the most likely class."""
    per_class: Annotated[int, Field(ge=1)] | Literal["smallest"] | None = None
    """Take at most this many images of each guessed class, the most confident ones; `smallest` takes as many as the
    rarest guessed class has. Images are never repeated, so a class with fewer stays smaller. Default: all."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.output, keep_file(self.output))


@dataclass(frozen=True)
class Counts:
    """How many images of each class (C,) are known, were guessed, and were taken; right: of those taken, if known."""

    known: NDArray[np.int64]
    guessed: NDArray[np.int64]
    taken: NDArray[np.int64]
    right: float | None


def keep_file(output: Path) -> Path:
    """The file with the numbers of the images with a label."""
    return output.with_suffix(".keep.npy")


def pseudo_label(config: PseudoLabelImages) -> Counts:
    """Write both files; DataError if they are there, or if no image is labelled."""
    config.begin_output()
    opened = open_classifier(config)
    index = open_subset(config.shards, keep=config.keep, key="shards")
    known = _known_labels(config, index, opened)
    unknown = np.flatnonzero(known < 0)
    batches = class_probabilities(opened, index, config, description="teacher", samples=unknown.tolist())
    probabilities = torch.cat(list(batches)).numpy() if len(unknown) else np.zeros((0, opened.num_classes), np.float32)
    chosen = choose(probabilities, threshold=config.threshold, per_class=config.per_class)
    labels = labels_of(known, unknown[chosen], probabilities[chosen], soft=config.soft)
    counts = _count(known, probabilities, chosen, unknown, index, opened)
    labelled = np.sort(np.concatenate([np.flatnonzero(known >= 0), unknown[chosen]]))
    if not len(labelled):
        raise DataError(
            f"No image of {config.shards} reaches threshold={config.threshold:g}: the most confident has "
            f"{_below(probabilities.max(initial=0), config.threshold)}. Take a smaller one, or another run."
        )
    origin = _origin(config, opened, counts)
    write_labels(config.output, index, labels, class_names=opened.class_names, origin=origin)
    write_keep(keep_file(config.output), index, labelled, origin=origin)
    print(summary(counts, opened.names_beside(index.class_names)))
    print(f"{len(labelled):,} of {len(index):,} images have a label -> {config.output} and {keep_file(config.output)}")
    return counts


def pseudo_label_once(config: PseudoLabelImages) -> Counts:
    """The same, or what it has written before; DataError if that is of another teacher or other settings."""
    description = config.output.with_suffix(".json")
    if not (description.exists() and keep_file(config.output).with_suffix(".json").exists()):
        return pseudo_label(config.model_copy(update={"overwrite": True}))  # what is left of an interrupted one
    origin = json.loads(description.read_text(encoding="utf-8"))["origin"]
    teacher = open_classifier(config).about
    if (origin["settings"], origin["teacher"]["weights_sha256"]) != (_settings(config), teacher["weights_sha256"]):
        raise DataError(
            f"{config.output} was written from another teacher than {config.run}, or with other settings. Choose "
            "another output, or delete it and what was trained on it."
        )
    known, guessed, taken = (np.array(origin[name], np.int64) for name in ("known", "guessed", "taken"))
    return Counts(known, guessed, taken, origin["right"])


def choose(
    probabilities_GC: NDArray[np.float32], *, threshold: float, per_class: int | Literal["smallest"] | None
) -> NDArray[np.int64]:
    """The numbers of the guessed images that are taken, ascending: confident enough, and the most confident of each
    class. Ties keep their order.
    """
    guesses_G, confidence_G = probabilities_GC.argmax(axis=1), probabilities_GC.max(axis=1, initial=0)
    sure = np.flatnonzero(confidence_G >= threshold)
    if per_class is None or not len(sure):
        return sure
    classes = [sure[guesses_G[sure] == label] for label in np.unique(guesses_G[sure])]
    count = min(map(len, classes)) if per_class == "smallest" else per_class
    surest = [of_class[np.argsort(-confidence_G[of_class], kind="stable")[:count]] for of_class in classes]
    return np.sort(np.concatenate(surest))


def labels_of(
    known_N: NDArray[np.int64], taken: NDArray[np.int64], probabilities_TC: NDArray[np.float32], *, soft: bool
) -> Labels:
    """Labels of all N images: those that are known, those guessed of the images `taken` (T,), and none of the others.

    Hard: int64 (N,), -1 = none. Soft: float32 (N, C), one-hot where the label is known, zeros where there is none.
    """
    if not soft:
        labels_N = known_N.copy()
        labels_N[taken] = probabilities_TC.argmax(axis=1)
        return labels_N
    labels_NC = np.zeros((len(known_N), probabilities_TC.shape[1]), np.float32)
    labels_NC[taken] = probabilities_TC
    is_known = np.flatnonzero(known_N >= 0)
    labels_NC[is_known, known_N[is_known]] = 1.0
    return labels_NC


def summary(counts: Counts, names: Sequence[str]) -> str:
    """One line for each class: its name, how many images are known, were guessed to be of it, and were taken."""
    lines = [
        printable(f"  {name}: {known:,} known, {guessed:,} guessed, {taken:,} taken")
        for name, known, guessed, taken in zip(
            names, counts.known.tolist(), counts.guessed.tolist(), counts.taken.tolist(), strict=True
        )
    ]
    right = "" if counts.right is None else f"\n{counts.right:.2f} % of those taken have the class in the shards"
    return "\n".join(lines) + right


def _below(value: np.float32, limit: float) -> str:
    """The value in the fewest digits, three or more, that show that it is below the limit."""
    texts = (f"{value:.{digits}g}" for digits in range(3, 10))
    return next((text for text in texts if float(text) < limit), f"{value:.9g}")


def _known_labels(config: PseudoLabelImages, index: ShardIndex, opened: OpenedClassifier) -> NDArray[np.int64]:
    """(N,): the labels that stay, -1 for all others; DataError if they are not there or of other classes."""
    labels_N = np.full(len(index), -1, np.int64)
    if config.known is None:
        return labels_N
    if not config.known.exists():
        raise DataError(f"known={config.known}: there is no such file. split_labels output=FILE.npy writes one.")
    known = open_subset(config.shards, keep=config.known, key="shards (known)")
    problem, names = known.label_problem(), index.class_names
    if problem is not None:
        raise DataError(f"known={config.known} must name images that have a label in {config.shards}. {problem}.")
    if None not in (names, opened.class_names) and names != opened.class_names:
        raise DataError(
            f"known={config.known} needs shards with the classes of the run, in its order. {config.shards} has "
            f"{names}, the run {opened.class_names}."
        )
    own = np.asarray(known.labels(), dtype=np.int64)
    if own.max() >= opened.num_classes:
        raise DataError(
            f"known={config.known} has label {own.max()}; the run has {opened.num_classes} classes, from 0."
        )
    _, places, of_known = np.intersect1d(index.in_whole_set(), known.in_whole_set(), return_indices=True)
    labels_N[places] = own[of_known]
    return labels_N


def _count(
    known: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    chosen: NDArray[np.int64],
    unknown: NDArray[np.int64],
    index: ShardIndex,
    opened: OpenedClassifier,
) -> Counts:
    guesses, num_classes = probabilities.argmax(axis=1), opened.num_classes
    own = np.asarray(index.labels(), dtype=np.int64)[unknown[chosen]]  # the set has no overlay of labels
    told = len(own) > 0 and bool((own >= 0).all()) and index.class_names == opened.class_names
    return Counts(
        known=np.bincount(known[known >= 0], minlength=num_classes),
        guessed=np.bincount(guesses, minlength=num_classes),
        taken=np.bincount(guesses[chosen], minlength=num_classes),
        right=100.0 * float((guesses[chosen] == own).mean()) if told else None,
    )


def _origin(config: PseudoLabelImages, opened: OpenedClassifier, counts: Counts) -> JSON:
    return {
        "command": "pseudo_label",
        "teacher": opened.about,
        "settings": _settings(config),
        "known": counts.known.tolist(),
        "guessed": counts.guessed.tolist(),
        "taken": counts.taken.tolist(),
        "right": counts.right,
    }


def _settings(config: PseudoLabelImages) -> dict[str, JSON]:
    """What the labels depend on besides the teacher and the images."""
    return config.model_dump(mode="json", include={"shards", "keep", "known", "threshold", "soft", "per_class"})


def main(config: PseudoLabelImages) -> None:
    pseudo_label(config)


def command(name: str = "python -m data_tools.pseudo_label") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(PseudoLabelImages, main, command=name)

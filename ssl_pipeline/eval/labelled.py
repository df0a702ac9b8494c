"""The labelled images of evaluators and monitors, checked once before anything is measured.

What makes a measure impossible is a ConfigError; what makes its figure doubtful is measured, and said.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.config import ConfigError, printable, some_of
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import display_name, packed_from
from ssl_pipeline.data.shards.shared import shared_images
from ssl_pipeline.distributed import rank
from ssl_pipeline.randomness import SPLIT, permutation

LABELS_OF_SHARDS = (
    "Pack only the labelled images, or label the others: make_shards takes labels from class folders or from "
    "labels=FILE.csv."
)
LABELS_OF_FILES = "Put each image into the folder of its class; make_shards takes a table too, labels=FILE.csv."

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with their classes, counted from 0.

    Labels (M,) and (N,) lie below `num_classes`, the number of classes that either set has images of: labels may be
    identifiers of any size. Classes are the same by name where both sets name theirs, else by number. warnings: what
    makes a measure on these images doubtful. class_names: of each class, its label where it has none.
    """

    train: ShardIndex
    test: ShardIndex
    train_labels: Tensor
    test_labels: Tensor
    num_classes: int
    warnings: tuple[str, ...]
    class_names: tuple[str, ...]


def open_labelled(train: str, test: str, *, task: str, shared: bool = True) -> LabelledImages:
    """Both sets, after checking that `task` can be measured on them: labels for all, two classes or more.

    `shared`: whether images that both have are looked for.
    Says on stderr, once, what makes it doubtful. Raises ConfigError for what makes it impossible.
    """
    indices = open_shards(train), open_shards(test)
    train, test = display_name(train), display_name(test)
    for directory, index in zip((train, test), indices, strict=True):
        require_labels(index, directory, task=task)
    (train_numbers_M, test_numbers_N), names = _same_classes(train, test, *indices)
    used_C = np.unique(np.concatenate((train_numbers_M, test_numbers_N)))
    present_C = np.unique(train_numbers_M)
    if len(present_C) < 2:
        raise ConfigError(
            f"{task} needs two classes or more in the training set. Got one: all images of {train} are of class "
            f"{_class_name(present_C[0], names)}."
        )
    found = unseen_classes(present_C, test_numbers_N, names, train=train, test=test)
    if shared:
        found += shared_warnings(indices[0], indices[1], train=train, test=test)
    say(found)
    train_labels, test_labels = (
        torch.from_numpy(np.searchsorted(used_C, numbers)) for numbers in (train_numbers_M, test_numbers_N)
    )
    class_names = tuple(str(label) if names is None else names[label] for label in used_C.tolist())
    return LabelledImages(indices[0], indices[1], train_labels, test_labels, len(used_C), found, class_names)


def some_of_each_class(images: LabelledImages, count: int, *, seed: int) -> Numbers:
    """`count` training images of each class, drawn at random; with the same seed fewer are the first of more.

    Raises ConfigError if a class has fewer.
    """
    fewest = int(images.train_labels.unique(return_counts=True)[1].min())
    if fewest < count:
        raise ConfigError(
            f"per_class={count} is more than {images.train.called} has of one of its classes: {fewest}. "
            "Take at most that many."
        )
    return draw_per_class(images.train_labels, count, seed=seed)


def draw_per_class(labels_N: Tensor, count: int | str, *, seed: int) -> Numbers:
    """The numbers of `count` images of each class, or of a share such as "1%", drawn at random, ascending."""
    chosen = []
    for label in labels_N.unique().tolist():
        of_class = np.flatnonzero(labels_N.numpy() == label)
        share = float(count.rstrip("% ")) / 100 if isinstance(count, str) else None
        number = count if share is None else max(int(len(of_class) * share + 0.5), 1)
        chosen.append(of_class[permutation(len(of_class), seed, SPLIT, label)[:number]])
    return np.sort(np.concatenate(chosen))


def require_labels(index: ShardIndex, directory: str, *, task: str, where: str = " in train and test") -> None:
    """Raise ConfigError, with the numbers and what to do, unless there are images and each has a label."""
    if not len(index):
        raise ConfigError(f"{directory} has no images; {task} needs some.")
    problem = index.label_problem()
    if problem is None:
        return
    labelled = int((index.labels() >= 0).sum())
    has = f"has labels for {labelled:,} of {len(index):,} images" if labelled else "has no labels"
    raise ConfigError(f"{directory} {has}; {task} needs them{where}. {problem}. {_labels_come_from(index)}")


def _labels_come_from(index: ShardIndex) -> str:
    """How to add labels: to a folder of images, and to shards."""
    return LABELS_OF_SHARDS if packed_from(index.folder) is None else LABELS_OF_FILES


def require_company(labels_N: Tensor, *, task: str) -> None:
    """Raise ConfigError if no class has two images: each by all others, all would be wrong whatever was learnt."""
    if len(labels_N.unique()) == len(labels_N):
        raise ConfigError(
            f"{task} of each image by all others needs two images of a class. Got {len(labels_N)} images of as many "
            "classes, so none could be right. Put images of one kind into one class folder, or give a test set."
        )


def look_at_first(index: ShardIndex, size: int, *, sample: int = 0) -> None:
    """Decode the first image that a measure takes, as it will; DataError if that fails."""
    EvaluationSet(index, size)[sample]


def evenly_spread(index: ShardIndex, count: int) -> list[int]:
    """The numbers of at most `count` images, evenly spread over those that are not known to be unreadable."""
    readable_N = np.flatnonzero(index.sizes().all(axis=1))
    count = min(count, len(readable_N))
    return readable_N[np.arange(count) * len(readable_N) // max(count, 1)].tolist()


def _same_classes(
    train: str, test: str, train_index: ShardIndex, test_index: ShardIndex
) -> tuple[tuple[Numbers, Numbers], Sequence[str] | None]:
    """Numbers of the classes of both sets that agree, and the names that they count."""
    names, test_names = train_index.class_names, test_index.class_names
    for directory, index in ((train, train_index), (test, test_index)):
        check_named(index, names or test_names if index.class_names is None else index.class_names, directory)
    labels = labels_of(train_index), labels_of(test_index)
    if names is None or test_names is None or names == test_names:
        return labels, names or test_names
    if not set(names) & set(test_names):
        first, second = (some_of(list(map(repr, own)), "") for own in (names, test_names))
        raise ConfigError(
            f"{train} and {test} must have classes in common. The first has {first}, the second {second}. Name the "
            "folders of a class alike in both."
        )
    both = list(dict.fromkeys((*names, *test_names)))
    return (by_name(labels[0], names, both), by_name(labels[1], test_names, both)), both


def labels_of(index: ShardIndex) -> Numbers:
    """The labels (N,) of shards, as they stand in them."""
    return np.asarray(index.labels(), dtype=np.int64)


def by_name(labels_N: Numbers, names: Sequence[str], known: Sequence[str]) -> Numbers:
    """Labels that count `names` as labels that count `known`; -1 for a name that is not known."""
    place_of = {name: place for place, name in enumerate(known)}
    return np.array([place_of.get(name, -1) for name in names], dtype=np.int64)[labels_N]


def classes_of(index: ShardIndex, where: str, *, num_classes: int, names: Sequence[str] | None) -> Numbers:
    """The class of each image as a classifier of `num_classes` counts them: by name where both have names.

    names: of the classifier's classes. where: what the images are called in errors. Raises ConfigError for images
    without a label, and for classes that the classifier does not know.
    """
    problem = index.label_problem()
    if problem is not None:
        raise ConfigError(
            f"{where} needs labels below {num_classes}. It has images without a label: {problem}. "
            f"{_labels_come_from(index)}"
        )
    labels_N, own = labels_of(index), index.class_names
    check_named(index, own, where.partition("=")[2] or where)
    if own is not None and names is not None:
        unknown = [own[label] for label in np.unique(labels_N) if own[label] not in names]
        if unknown:
            raise ConfigError(
                f"{where} needs the classes of the labelled images ({', '.join(names[:5])}, ...: {len(names)} in all). "
                f"It has images of {unknown[0]!r}."
            )
        return by_name(labels_N, own, names)
    if labels_N.max() >= num_classes:
        raise ConfigError(f"{where} needs labels below {num_classes}. It has the label {labels_N.max()}.")
    return labels_N


def check_named(index: ShardIndex, names: Sequence[str] | None, directory: str) -> None:
    """Raise ConfigError for a label that lies beyond the names of the classes."""
    largest = int(index.labels().max())
    if names is not None and largest >= len(names):
        raise ConfigError(
            f"Labels of {directory} must lie below the number of class names ({len(names)}). Got {largest}."
        )


def unseen_classes(
    present_C: Numbers, test_numbers_N: Numbers, names: Sequence[str] | None, *, train: str, test: str
) -> tuple[str, ...]:
    """A sentence on the classes of test images that no training image has."""
    classes_U, counts_U = np.unique(test_numbers_N[~np.isin(test_numbers_N, present_C)], return_counts=True)
    if not len(classes_U):
        return ()
    listed = [
        f"{_class_name(number, names)} ({count})"
        for number, count in zip(classes_U.tolist(), counts_U.tolist(), strict=True)
    ]
    return (
        f"{int(counts_U.sum()):,} of {len(test_numbers_N):,} images of {test} are of classes that {train} has no image "
        f"of, and count as wrong: {some_of(listed, '')}.",
    )


def shared_warnings(first: ShardIndex, second: ShardIndex, *, train: str, test: str) -> tuple[str, ...]:
    """A sentence on the test images that are training images too; only the first process looks for them."""
    if rank() > 0:
        return ()
    shared = shared_images(first, second)
    if not shared.count:
        return ()
    looked_at = "" if shared.looked_at == shared.total else f" (of {shared.looked_at:,} that were looked at)"
    return (
        f"{shared.count:,} of {shared.total:,} images of {test}{looked_at} are in {train} too: the accuracy on them "
        "says nothing about new images.",
    )


def _class_name(number: int, names: Sequence[str] | None) -> str:
    return str(number) if names is None else f"'{names[number]}'"


def say(warnings: Sequence[str]) -> None:
    """Print each sentence on stderr, on the first process."""
    for text in warnings if rank() == 0 else ():
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)

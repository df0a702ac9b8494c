"""What a run that has ended says of its use: commands to copy, with the run's own shards where they will do."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from ssl_pipeline.backbones.classifier import FILE_NAME as CLASSIFIER_FILE
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.eval.knn import KnnConfig

PER_CLASS = 2  # images that a class has at least in the mean: each needs another one to vote for it


def measuring(run: Path, index: ShardIndex, own: str | None) -> str:
    """The command that measures the run, which trained on `index`: by its own classifier, or else by k-NN.

    With a classifier, the command that writes its labels of images too, as a second line.
    own: the shards that stand for the run's `images`, None without such. If they have labels that k-NN can be told of,
    each image is classified by all others; else the shards of labelled images are left to the reader.
    """
    place = shlex.quote(str(run))
    if (run / CLASSIFIER_FILE).is_file():
        table = shlex.quote(str(run / "labels.csv"))
        return (
            f"Evaluate with: {_command('classifier')} run={place} test=SHARDS\n"
            f"Its labels for images: {_command('predict')} run={place} source=FOLDER output={table}"
        )
    start = f"Evaluate with: {_command('knn')} run={place}"
    if own is None or not _can_vote(index):
        return f"{start} train=SHARDS test=SHARDS"
    return f"{start} train={shlex.quote(own)} test={shlex.quote(own)} leave_one_out=true"


def of_the_run(run: Path, own: str | None) -> str:
    """The commands that show the run as a page and, with images of its own, write their features as a table."""
    place = shlex.quote(str(run))
    page = f"As a page: {_command('report')} run={place}"
    if own is None:
        return page
    table = shlex.quote(str(run / "features.npz"))
    return f"{page}\nFeatures of its images: {_command('embed')} run={place} source={shlex.quote(own)} output={table}"


def features_in_python(shards: str) -> str:
    """How a program gets the features of the run's own images, after `in_python`."""
    return (
        "    # of all images of the run: (N, embed_dim), and the key of each\n"
        f"    features, keys = ssl_pipeline.embed(backbone, {shards!r})"
    )


def _command(name: str) -> str:
    """As this installation calls it from here: a checkout has `eval/`, and without one there is the console command."""
    return f"python -m eval.{name}" if Path("eval", f"{name}.py").is_file() else f"ssl-pipeline {name}"


def _can_vote(index: ShardIndex) -> bool:
    """Whether all images have a label, of two classes or more, and there are enough of them."""
    if index.num_soft_classes is not None or not index.has_labels:
        return False
    (most,) = KnnConfig.model_fields["k"].default
    return len(index) > most and 2 <= len(np.unique(index.labels())) <= len(index) / PER_CLASS

"""What a finished run says about its use: commands to copy, with the images that the run knows of."""

from __future__ import annotations

import shlex
from pathlib import Path

from ssl_pipeline.backbones.classifier import FILE_NAME as CLASSIFIER_FILE
from ssl_pipeline.eval.labelled_sets import UNKNOWN, labelled_sets, measured_on


def measuring(run: Path, own: str | None) -> str:
    """The command that measures the run: by its own classifier, otherwise by k-NN.

    With a classifier, the command that writes its labels of images too, as a second line.
    own: the shards of the run's images, if they can be named by one text. The labelled images are those that the run
    knows of; where it knows of none they are left to the reader.
    """
    place = shlex.quote(str(run))
    if not (run / CLASSIFIER_FILE).is_file():
        return f"Evaluate with: {_command('knn')} run={place} {labelled_sets(run) or UNKNOWN}"
    table, test = shlex.quote(str(run / "labels.csv")), measured_on(run)
    measured, named = (shlex.quote(images) if images else None for images in (test, own or test))
    return (
        f"Evaluate with: {_command('classifier')} run={place} test={measured or 'SHARDS'}\n"
        f"Its labels for images: {_command('predict')} run={place} source={named or 'FOLDER'} output={table}"
    )


def of_the_run(run: Path, own: str | None, page: Path | None = None) -> str:
    """Where the page of the run is, or the command that writes it, and the command that writes the features of its own
    images as a table."""
    place = shlex.quote(str(run))
    as_page = f"As a page: {page or _command('report') + ' run=' + place}"
    if own is None:
        return as_page
    table = shlex.quote(str(run / "features.npz"))
    return (
        f"{as_page}\nFeatures of its images: {_command('embed')} run={place} source={shlex.quote(own)} output={table}"
    )


def in_python(run: Path, own: str | None = None) -> str:
    """How a program uses the backbone of a finished run, as docs/runs.md shows it.

    own: the run's own images, whose features it gets.
    """
    of_all = (
        "\n    # of all images of the run: (N, embed_dim), and the key of each\n"
        f"    features, keys = ssl_pipeline.embed(backbone, {own!r})"
    )
    return (
        "In Python:\n"
        "    import ssl_pipeline\n"
        "    from PIL import Image\n"
        f"    backbone = ssl_pipeline.load({str(run)!r})\n"
        "    image = backbone.transform()(Image.open('photo.jpg'))\n"
        f"    features = backbone(image[None]).detach()  # (1, backbone.embed_dim){'' if own is None else of_all}"
    )


def _command(name: str) -> str:
    """The command as called in this installation: from a checkout `eval/`, otherwise the console command."""
    return f"python -m eval.{name}" if Path("eval", f"{name}.py").is_file() else f"ssl-pipeline {name}"

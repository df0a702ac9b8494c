"""Pretraining and its measures as functions, for scripts and notebooks; `import ssl_pipeline` offers them."""

from __future__ import annotations

import io
import json
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.backbones import Backbone, load_run
from ssl_pipeline.commands import pretrain as command
from ssl_pipeline.commands.images import expand
from ssl_pipeline.commands.report import report
from ssl_pipeline.config import RECIPES, ConfigError, RunError, Value, failure_sentence, is_out_of_memory, load
from ssl_pipeline.config.arguments import leaves
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import ORIGINS_FILE
from ssl_pipeline.eval.features.extract import Precision, extract_features
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.eval.labelled import open_labelled, require_company
from ssl_pipeline.eval.report import ReportConfig
from ssl_pipeline.eval.search.neighbours import nearest_neighbours, other_neighbours, require_finite, require_k
from ssl_pipeline.eval.votes import votes_accuracy
from ssl_pipeline.packing.images_as_shards import holds_images
from ssl_pipeline.packing.output import REJECTED_FILE
from ssl_pipeline.packing.packed_once import pack_once

ARGUMENTS = {"images": "images", "data.shards": "shards", "recipe": "recipe", "output": "output"}
KNN, DIGITS = "k-NN", "digits"

Source = str | Path | tuple[str, ...]
"""Shards in any form of data.shards, a folder or zip of images, or one image."""


class KnnAccuracy(TypedDict):
    """Top-1 and top-5 in percent, and the 95 % interval of top-1."""

    top1: float
    top5: float
    top1_interval: tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A run that has ended: its directory, and the shards that it trained on."""

    path: Path
    shards: str | tuple[str, ...]

    @cached_property
    def backbone(self) -> Backbone:
        """What it exported, in eval mode on the CPU."""
        return load_run(self.path).backbone.eval()

    def report(self) -> Path:
        """The run as one self-contained page, `report/index.html` in its directory, as `eval.report` writes it."""
        return report(ReportConfig(run=(self.path,)))


def pretrain(
    *,
    images: str | Path | None = None,
    shards: str | Path | None = None,
    recipe: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Run:
    """Pretrain a backbone, as `pretrain.py` does; the same call again resumes, or finds the run complete.

    images: a folder of any depth or a zip, packed into shards inside the run; or shards: those that are there. One
    of them, unless the recipe names shards. recipe: a shipped one or a YAML file; with images it may be left out,
    and is then chosen by them and by the machine. output: the run's directory, `runs/NAME` by default.
    overrides: settings over the recipe's, by dotted keys or in sections: `{"train.steps": 100, "optim": {"lr": 1e-3}}`.

    Ctrl-C finishes the step, saves, and raises KeyboardInterrupt; the same call goes on from there. Another signal
    saves too and raises SystemExit. Raises ConfigError for a mistake in settings or data, RunError for a run that
    cannot go on.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("pretrain() must be called from the main thread, where signals arrive. Got another one.")
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(f"overrides must be a dict of settings by their keys. Got {type(overrides).__name__}.")
    if images is shards is recipe is None:
        raise ConfigError("pretrain() needs images=FOLDER or shards=DIR, or a recipe that names shards.")
    values = {key: _plain(key, value) for key, value in (overrides or {}).items()}
    taken = dict(leaves(values))
    for key, name in ARGUMENTS.items():
        if key in taken:
            raise ConfigError(f"overrides must leave {key} to the argument {name}. Got {taken[key]!r}.")
    given = {"recipe": recipe, "images": images, "data.shards": shards, "output": output}
    arguments = [f"{key}={text}" for key, text in given.items() if text is not None]
    schema = command.PretrainConfig
    with _explained():
        config = load(schema, expand(arguments, values, timed=schema), recipes=RECIPES, overrides=values)
        code = command.pretrain(config)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return Run(config.run_directory, config.data.shards)


def embed(
    backbone: Backbone,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 2,
    device: str = "auto",
    precision: Precision = "no",
) -> tuple[Tensor, list[str]]:
    """Features (N, D) float32 of all images of a source, as the evaluators see them, and the key of each.

    source: shards, whose keys are those of their samples (column `key` of eval.embed); or a folder or zip of images, or
    one, whose keys are the names of their files (column `file` of eval.embed, whose `key` is that of the shards that it
    packs). The latter are packed into temporary shards first (as large as the images), and files that
    cannot be decoded are left out with a warning. Raises ConfigError for a backbone that is not from a run and for a
    source without images.
    """
    _require_backbone(backbone, "embed")
    with _explained(), _shards_of(source, "source") as shards:
        index = open_shards(shards)
        features = _features(backbone, index, batch_size, workers, device, precision)
        keys = [index.key(sample) for sample in range(len(index))]
        if shards != source:  # packed for this call
            with (Path(str(shards)) / ORIGINS_FILE).open(encoding="utf-8") as file:
                files = {entry["key"]: entry["file"] for entry in map(json.loads, file)}
            keys = [files[key] for key in keys]
    return features, keys


def knn(
    backbone: Backbone,
    train: str | Path,
    test: str | Path | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    workers: int = 2,
    device: str = "auto",
    precision: Precision = "no",
) -> KnnAccuracy:
    """Weighted k-NN accuracy of labelled images, as `eval.knn` measures it.

    train, test: shards with labels, or folders (zips) of class folders. Without test each image of train is classified
    by all others. Warnings about the images (test images that are training images too) are printed on stderr. Raises
    ConfigError for a backbone that is not from a run, and if there are no labels, or fewer than k training images.
    """
    _require_backbone(backbone, "knn")
    with _explained(), ExitStack() as opened:
        alone, train_shards = test is None, opened.enter_context(_shards_of(train, "train"))
        test_shards = train_shards if test is None else opened.enter_context(_shards_of(test, "test"))
        images = open_labelled(str(train_shards), str(test_shards), task=KNN, shared=not alone)
        if alone:
            require_company(images.train_labels, task=KNN)
        require_k(k, len(images.train) - alone)
        settings = batch_size, workers, device, precision
        train_MD = normalize(_features(backbone, images.train, *settings), dim=1)
        test_ND = train_MD if alone else normalize(_features(backbone, images.test, *settings), dim=1)
        require_finite(train_MD, what="training images")
        require_finite(test_ND, what="test images")
        if alone:
            similarities_NK, neighbours_NK = other_neighbours(train_MD, k=k)
        else:
            similarities_NK, neighbours_NK = nearest_neighbours(train_MD, test_ND, k=k)
        found = votes_accuracy(
            similarities_NK,
            images.train_labels[neighbours_NK],
            images.test_labels,
            k=(k,),
            temperature=temperature,
            num_classes=images.num_classes,
        )[k]
    interval = share_interval(found["top1"], len(images.test))
    return {"top1": found["top1"], "top5": found["top5"], "top1_interval": interval}


def _require_backbone(backbone: object, call: str) -> None:
    """Raises ConfigError, with what to write, for what is not a backbone: a run, a path, another library's network."""
    if isinstance(backbone, Backbone):
        return
    if isinstance(backbone, str | Path) and (Path(backbone).expanduser() / "backbone.json").is_file():
        raise ConfigError(
            f"{call}() takes a backbone, not a path. Write {call}(ssl_pipeline.load({str(backbone)!r}), ...)."
        )
    instead = f"Write {call}(run.backbone, ...)" if isinstance(backbone, Run) else "ssl_pipeline.load(RUN) gives one"
    raise ConfigError(f"{call}() takes a backbone. Got {type(backbone).__name__}. {instead}.")


def _features(
    backbone: Backbone, index: ShardIndex, batch_size: int, workers: int, device: str, precision: Precision
) -> Tensor:
    """(N, D), computed on `device`; the backbone is moved back afterwards."""
    if not len(index):
        raise ConfigError(f"{index.called} has no images.")
    preprocessing, home = backbone.transform().preprocessing, next(backbone.parameters()).device
    chosen = choose_device(device)
    try:
        features, _ = extract_features(
            backbone.to(chosen),
            index,
            preprocessing,
            batch_size=batch_size,
            workers=workers,
            device=chosen,
            precision=precision,
        )
    finally:
        backbone.to(home)
    return features


@contextmanager
def _shards_of(source: Source, key: str) -> Iterator[Source]:
    """The shards that the argument `key` is; of a folder or zip of images, temporary ones."""
    if isinstance(source, tuple) or not _holds_images(source):
        yield source
        return
    text = str(Path(source).expanduser())
    with tempfile.TemporaryDirectory(prefix="ssl_pipeline-") as place:
        with redirect_stdout(io.StringIO()):  # it names a temporary path
            shards = pack_once(text, Path(place), key=key)
        if left_out := len((shards / REJECTED_FILE).read_text(encoding="utf-8").splitlines()):
            warnings.warn(
                f"{left_out:,} files of {source} cannot be decoded as images and are left out; make_shards lists them.",
                stacklevel=4,
            )
        yield str(shards)


def _holds_images(source: str | Path) -> bool:
    return str(source) == DIGITS or holds_images(str(source))


def _plain(key: str, value: object) -> Value:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(f"{key}.{name}", item) for name, item in value.items()}
    raise ConfigError(f"overrides must hold numbers, text, lists and sections. Got {key}={value!r}.")


@contextmanager
def _explained() -> Iterator[None]:
    """What the system refuses, memory or a file, is a RunError in one sentence; a bug stays as it is."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except torch.OutOfMemoryError as error:
        raise RunError(failure_sentence(error)) from error
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise RunError(failure_sentence(error)) from error

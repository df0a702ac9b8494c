"""The images that an evaluator is given: shards in any form, or a folder or zip of images, which is packed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ssl_pipeline.backbones.runs import require_run
from ssl_pipeline.config import Config, run_command
from ssl_pipeline.config.output_file import require_writable
from ssl_pipeline.data.shards.catalogue import user_cache
from ssl_pipeline.eval.features.models import ModelConfig, open_model
from ssl_pipeline.eval.labelled import say
from ssl_pipeline.files import sha256_of_bytes
from ssl_pipeline.packing.images_as_shards import holds_images, packed, require_images
from ssl_pipeline.packing.packed_once import is_packed

IMAGES = ("train", "test", "images")
"""The settings of evaluators that name images."""
Evaluation = TypeVar("Evaluation", bound=Config)


def open_what_is_named(config: Config) -> None:
    """Raise ConfigError for a network that cannot be opened, if the settings name one."""
    if isinstance(config, ModelConfig):
        open_model(config)


def run_evaluator(
    schema: type[Evaluation],
    main: Callable[[Evaluation], int | None],
    *,
    command: str,
    shared: bool = False,
    check: Callable[[Evaluation], object] = open_what_is_named,
) -> int:
    """`run_command` for an evaluator whose images may be folders or zips.

    check: raises ConfigError for what is wrong whatever the images are; called before any are packed.
    """

    def evaluate(config: Evaluation) -> int | None:
        directory = _directory(config)
        say_what_is_kept(directory)
        return main(with_shards(config, directory, check=check))

    return run_command(schema, evaluate, command=command, shared=shared)


def say_what_is_kept(directory: Path | None) -> None:
    """Say that nothing is kept of a measure without a directory; ConfigError for one that cannot be written."""
    if directory is not None:
        require_writable(directory, key=f"{directory}/eval")
    else:
        say(["Without run=DIR or output=DIR nothing is kept, neither features nor a report."])


def with_shards(
    config: Evaluation,
    directory: Path | None,
    *,
    keys: Sequence[str] = IMAGES,
    check: Callable[[Evaluation], object] = open_what_is_named,
) -> Evaluation:
    """The same settings on shards: folders and zips of images are packed, once, and again where they have changed.

    keys: the settings that name images. The shards are kept in DIRECTORY/eval/images, without one in the user's cache.
    Raises ConfigError for images, and a run, that are not there, and what `check` raises, before anything is packed.
    """
    given = {key: value for key in keys if isinstance(value := getattr(config, key, None), str)}
    for key, source in given.items():
        require_images(source, key=key)
    folders = {key: source for key, source in given.items() if holds_images(source)}
    if not folders:
        return config
    run = getattr(config, "run", None) or ()
    for one in (run,) if isinstance(run, Path) else run:
        require_run(one)
    places = {key: place_of(source, directory) for key, source in folders.items()}
    if not all(map(is_packed, places.values())):
        check(config)
    shards = {key: packed(folders[key], place, key=key, renewed=True) for key, place in places.items()}
    return config.model_copy(update=shards)


def place_of(source: str, directory: Path | None) -> Path:
    """Where the shards of a folder or zip are kept: by its name and its path, as names may repeat."""
    path = Path(source).expanduser().resolve()
    name = f"{path.stem or 'images'}-{sha256_of_bytes(str(path).encode())[:8]}"
    return (user_cache() if directory is None else directory / "eval") / "images" / name


def _directory(config: Config) -> Path | None:
    """Where an evaluator writes: its output, or the run."""
    output, run = (getattr(config, name, None) for name in ("output", "run"))
    return next((Path(place) for place in (output, run) if isinstance(place, Path)), None)

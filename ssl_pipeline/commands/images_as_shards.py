"""A folder or zip of images that a command is given, as shards: packed by its first process, once, for all of them."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path

from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.config import RECIPES, Config, ConfigError, Value, launched_rank, load
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data_tools.packed_once import IN_A_RUN, is_packed, pack_once
from ssl_pipeline.data_tools.sources import Source

SECONDS_BETWEEN_LOOKS = 0.5


def holds_shards(source: str) -> bool:
    """Whether a source of images is shards already: a folder of some, files, a pattern, or an address elsewhere."""
    path = Path(source).expanduser()
    return source.endswith(".tar") or "://" in source or (path.is_dir() and any(path.glob("*.tar")))


def holds_images(source: str) -> bool:
    """Whether a source is a folder or a zip of images, which are to be packed."""
    path = Path(source).expanduser()
    return not holds_shards(source) and (path.is_dir() or path.suffix.lower() == ".zip")


def packed(
    source: str,
    place: Path,
    *,
    key: str = "images",
    way_out: str = IN_A_RUN,
    short_side: int | None = None,
    opened: Source | None = None,
) -> str:
    """Where the images of a folder or a zip are as shards, made of them once in `place`.

    The first process packs them, and the others wait for it. The arguments are those of `pack_once`.
    """
    source = str(Path(source).expanduser())
    if launched_rank() != "0":
        while not is_packed(place):
            time.sleep(SECONDS_BETWEEN_LOOKS)  # if the first process fails, the launcher ends this one
    return str(pack_once(source, place, key=key, way_out=way_out, short_side=short_side, opened=opened))


def check_before_packing(
    schema: type[Config], arguments: Sequence[str], overrides: Mapping[str, Value] | None = None
) -> None:
    """Raise ConfigError for settings that no run can have, and for weights that do not fit their network."""
    with redirect_stderr(io.StringIO()):  # what the reading notes is told when the run reads them
        settings = load(schema, arguments, recipes=RECIPES, overrides=overrides)
    backbone = getattr(settings, "backbone", None)
    if isinstance(backbone, BackboneConfig) and backbone.weights is not None:
        create_backbone(backbone)


def open_source(source: str, cache: Path) -> tuple[str, ShardIndex]:
    """The images of a folder or a zip, packed once into `cache`, or of shards; ConfigError if there are none."""
    if holds_images(source):
        source = packed(
            source, cache, key="source", way_out=f"Put the files back, or delete '{cache}' to pack what is there now."
        )
    index = open_shards(source)
    if not len(index):
        raise ConfigError(f"source={source} has no images.")
    return source, index

"""Images that a command is given (a folder, a zip, one file) as shards: packed once, by its first process."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

from ssl_pipeline.config import ConfigError, launched_rank
from ssl_pipeline.data.shards.listing import list_shards, shards_may_be_at
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.packing.conversion import is_image_name
from ssl_pipeline.packing.packed_once import is_current, is_packed, pack_once
from ssl_pipeline.packing.sources import Source
from ssl_pipeline.packing.sources import open_source as open_files

SECONDS_BETWEEN_LOOKS = 0.5


def holds_shards(source: str) -> bool:
    """Whether a source of images is shards already: a folder of some, files, a pattern, or an address elsewhere."""
    path = Path(source).expanduser()
    return source.endswith(".tar") or "://" in source or (path.is_dir() and any(path.glob("*.tar")))


def holds_images(source: str) -> bool:
    """Whether a source is a folder or a zip of images, or one of them, which are to be packed."""
    path = Path(source).expanduser()
    named = path.is_file() and (path.suffix.lower() == ".zip" or is_image_name(path.name))
    return not holds_shards(source) and (path.is_dir() or named or zipfile.is_zipfile(path))


def require_images(source: str, *, key: str) -> None:
    """Raise ConfigError if there are neither images to pack nor shards; key: the setting that names them."""
    if not holds_images(source) and not shards_may_be_at(source):
        if Path(source).expanduser().exists() or set("*?[{") & set(source):
            list_shards(source)  # says what is there
        raise ConfigError(f"{key}={source} does not exist. Needed: an image, a folder or a zip of images, or shards.")


def packed(
    source: str,
    place: Path,
    *,
    key: str = "images",
    renewed: bool = False,
    short_side: int | None = None,
    opened: Source | None = None,
) -> str:
    """Where the images of a folder or a zip, or one image, are as shards, made of them once in `place`.

    The first process packs them, and the others wait for it. The arguments are those of `pack_once`.
    """
    source = str(Path(source).expanduser())
    if launched_rank() == "0":
        return str(pack_once(source, place, key=key, renewed=renewed, short_side=short_side, opened=opened))
    files = opened or open_files(source, key=key)
    while not (is_packed(place) and (not renewed or is_current(files, place))):
        time.sleep(SECONDS_BETWEEN_LOOKS)  # if the first process fails, the launcher ends this one
    return str(pack_once(source, place, key=key, opened=files))


def open_source(source: str, cache: Path) -> tuple[str, ShardIndex]:
    """The images of a folder or a zip, or one, packed once into `cache`, or of shards; ConfigError if there are none.

    A folder that has changed is packed again.
    """
    if holds_images(source):
        source = packed(source, cache, key="source", renewed=True)
    elif Path(source).expanduser().is_file() and not holds_shards(source):
        raise ConfigError(f"source={source} is no image, zip or shard (.tar). Give one, or a folder of them.")
    index = open_shards(source)
    if not len(index):
        raise ConfigError(f"source={source} has no images.")
    return source, index

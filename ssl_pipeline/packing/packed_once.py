"""A folder or zip of images, packed into shards once and known again afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from ssl_pipeline.config import printable
from ssl_pipeline.data.decode import DecodeError, decoded_size
from ssl_pipeline.data.shards.manifest import read_manifest
from ssl_pipeline.data.shards.open import DataError
from ssl_pipeline.data.shards.origins import LISTING, packed_from
from ssl_pipeline.files import write_text
from ssl_pipeline.packing.candidates import Candidates, find_candidates, no_images, parts_of_a_set
from ssl_pipeline.packing.conversion import storable
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from ssl_pipeline.packing.sources import Source, UnreadableFileError, open_source

SHARDS = "images"
NAMES_SHOWN = 3
LOOKED_AT = 200  # images


def pack_once(
    source: str,
    place: Path,
    *,
    key: str = "images",
    renewed: bool = False,
    short_side: int | None = None,
    opened: Source | None = None,
) -> Path:
    """The folder of shards below `place` with the images of `source`, packed if they are not there yet.

    key: the setting that names the source, for errors. renewed: whether a source that has changed is packed again, with
    a message, or refused. opened: the source, where it is open already. short_side: of images that are packed now, the
    largest shorter side in pixels; they become JPEG. The manifest of the shards says it.

    LISTING next to it has the name and size of each image file as it was packed; it is written last, so that shards
    without it are those of a start that was cut short. Raises DataError, which names some files, for a source that has
    changed: contents and times are not compared, so that a copy is the same and no file is read.
    """
    shards, listing = place / SHARDS, place / LISTING
    files = opened or open_source(source, key=key)
    found = find_candidates(files)
    now = _sizes(files, found)
    if listing.exists():
        before = read_listing(listing)
        if before == now and _is_whole(shards):
            return shards
        changed = f"{key}='{source}' has changed since it was packed into '{shards}': {differences(before, now)}."
        if before != now and not renewed:
            original = packed_from(shards)
            if original is not None and Path(original).resolve() != Path(source).expanduser().resolve():
                raise DataError(
                    f"{key}='{source}' is not what was packed into '{shards}', which came from '{original}': "
                    f"{differences(before, now)}. Choose another output=DIR, or set {key}={original}."
                )
            raise DataError(
                f"{changed} Put the files back, or choose another output=DIR to train on what is there now."
            )
        told = changed if before != now else f"Shards of {key}='{source}' are gone from '{shards}'."
        print(printable(f"{told} It is packed again."), flush=True)
    if not found.images:
        raise DataError(no_images(key, source, found))
    place.mkdir(parents=True, exist_ok=True)
    parts = parts_of_a_set(found)  # no classes, and a run without labels takes all of them
    if parts:
        print(printable(_one_of_all(source, parts, len(found.images), key=key)), flush=True)
    labels = "none" if parts else None
    settings = MakeShards(source=source, output=shards, labels=labels, short_side=short_side, overwrite=shards.exists())
    make_shards(settings, opened=files)
    write_text(listing, "".join(json.dumps([name, size]) + "\n" for name, size in now.items()))
    return shards


def _one_of_all(source: str, parts: Sequence[str], count: int, *, key: str) -> str:
    """What to say about a source with train/ and test/, or similar."""
    way = f"{key}={source}/{parts[0]}" if Path(source).is_dir() else f"make_shards source={source} prefix={parts[0]}/"
    return (
        f"{key}={source} holds {', '.join(f'{name}/' for name in parts)}: parts of a data set. All {count:,} images "
        f"are packed as one set, without labels. {way} takes one of them, and its folders as classes."
    )


def look_at(files: Source) -> tuple[int, int]:
    """How many images a source has by their names, and the median of the shorter sides of some, in pixels.

    Of JPEG, PNG and WebP only the headers are decoded. 0 pixels where none of them says.
    """
    names = [image.name for image in find_candidates(files).images]
    sides = []
    for name in names[:: max(len(names) // LOOKED_AT, 1)]:
        try:
            sides.append(min(decoded_size(storable(files.read(name)))))
        except (UnreadableFileError, DecodeError):
            continue
    return len(names), int(median(filter(None, sides))) if any(sides) else 0


def is_packed(place: Path) -> bool:
    """Whether `pack_once` has finished in `place`."""
    return (place / LISTING).exists() and _is_whole(place / SHARDS)


def _is_whole(shards: Path) -> bool:
    """Whether all written shards still exist; a user may have deleted some."""
    manifest = read_manifest(shards) if shards.is_dir() else None
    return manifest is not None and all((shards / shard.name).is_file() for shard in manifest.shards)


def is_current(files: Source, place: Path) -> bool:
    """Whether what is packed in `place` are the images that a source has now."""
    return is_packed(place) and read_listing(place / LISTING) == _sizes(files, find_candidates(files))


def _sizes(files: Source, found: Candidates) -> dict[str, int]:
    """Image file -> bytes, as LISTING has them."""
    return {image.name: files.size(image.name) for image in found.images}


def read_listing(path: Path) -> dict[str, int]:
    """File name -> bytes; raises DataError if the listing is damaged."""
    try:
        return {str(name): int(size) for name, size in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    except (ValueError, TypeError) as error:
        raise DataError(f"'{path}' is damaged ({error}). Delete it and the folder {SHARDS} next to it.") from None


def differences(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """How many files are new, gone or of another size, with some of their names."""
    kinds = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "of another size": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    return ", ".join(f"{len(names):,} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")

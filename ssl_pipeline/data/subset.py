"""Labels and subsets next to the shards: FILE.npy with a FILE.json that says which set of images it belongs to.

`data.keep=FILE.npy` holds the numbers of the images that stay: int64 (K,), ascending. `data.labels=FILE.npy` holds a
label for every image of the whole set, whatever `keep` leaves of it: int64 (N,), -1 = none, or soft labels float32 (N,
C), a row of zeros = none. Both count the images of the shards from 0, in the order of the index. What `keep` leaves is
renumbered from 0: these are the `sample_ids` of batches, the rows of per-sample buffers and of `labels()`;
`ShardIndex.in_whole_set` gives the numbers in the whole set again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.listing import ShardSource
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.overlay import NO_OVERLAY, Labels, Overlay, check_keep, check_labels
from ssl_pipeline.files import JSON, read_array, sha256_of, write_array, write_json

FORMAT = 1
SMALL = 4096  # bytes

Content = Literal["keep", "labels"]
IN_WORDS = {"keep": "numbers of images to keep", "labels": "labels"}


def open_subset(
    shards: ShardSource,
    *,
    keep: Path | None = None,
    labels: Path | None = None,
    cache_dir: Path | None = None,
    cache_gb: float = 50.0,
    image_key: str | None = None,
    budget: float = 0.01,
    key: str = "data",
) -> ShardIndex:
    """The shards (`open_shards`), less the images that `keep` leaves out, with the labels of `labels`.

    Raises DataError, with the setting below `key` that it comes from, if a file was not made for these shards.
    """
    index = open_shards(shards, cache_dir=cache_dir, cache_gb=cache_gb, image_key=image_key, budget=budget)
    if keep is None and labels is None:
        return index
    names, checksums = None, list[str]()
    if keep is not None:
        where = f"{key}.keep={keep}"
        beside = _read_description(keep, "keep", index, where=where)
        check_keep(_load(keep, where), len(index), where=where)
        checksums.append(f"keep {beside.sha256}")
    if labels is not None:
        where = f"{key}.labels={labels}"
        beside = _read_description(labels, "labels", index, where=where)
        names = beside.class_names
        check_labels(_load(labels, where), len(index), names, where=where)
        checksums.append(f"labels {beside.sha256} {json.dumps(names)}")
    return index.overlaid(Overlay(keep, labels, names, tuple(checksums)))


def write_keep(path: Path, index: ShardIndex, samples: ArrayLike, *, origin: JSON) -> None:
    """Write a file for `data.keep`, and its description next to it: only these images of `index` stay.

    `samples` are numbers in `index`, in any order. Of a subset a smaller one can be made; the file counts in the whole
    set. `origin` says where the choice comes from. Raises DataError for what could not be read again.
    """
    places = np.unique(np.asarray(samples))
    if not len(places):
        raise DataError(f"No image of {index.called} is left to keep, so '{path}' is not written.")
    if places.dtype.kind not in "iu":
        raise DataError(f"The images to keep must be given by their numbers, not by a mask. Got {places.dtype}.")
    if not (places[0] >= 0 and places[-1] < len(index)):
        raise DataError(f"The images to keep must lie in [0, {len(index)}). Got {places[0]} to {places[-1]}.")
    whole = index.overlaid(NO_OVERLAY)
    numbers = index.in_whole_set(places.astype(np.int64))
    check_keep(numbers, len(whole), where=str(path))
    _write(path, "keep", numbers, whole, class_names=None, origin=origin)


def write_labels(
    path: Path, index: ShardIndex, labels: Labels, *, class_names: Sequence[str] | None, origin: JSON
) -> None:
    """Write a file for `data.labels`, and its description next to it: a label for each image of `index`.

    int64 (N,), -1 = none, or float32 (N, C), a row of zeros = none. The images that a subset leaves out get none.
    `origin` says where the labels come from. Raises DataError for what could not be read again.
    """
    if len(labels) != len(index):
        raise DataError(f"There must be a label for each of the {len(index)} images. Got {len(labels)}.")
    whole = index.overlaid(NO_OVERLAY)
    if len(whole) != len(index):
        of_whole_set = np.full((len(whole), *labels.shape[1:]), -1 if labels.ndim == 1 else 0, labels.dtype)
        of_whole_set[index.in_whole_set()] = labels
        labels = of_whole_set
    names = None if class_names is None else tuple(class_names)
    check_labels(labels, len(whole), names, where=str(path))
    _write(path, "labels", labels, whole, class_names=names, origin=origin)


@dataclass(frozen=True)
class _Description:
    """The content of FILE.json: the SHA-256 of FILE.npy, and the names of the classes of labels."""

    sha256: str
    class_names: tuple[str, ...] | None


def _write(
    path: Path,
    content: Content,
    array: NDArray,
    whole: ShardIndex,
    *,
    class_names: tuple[str, ...] | None,
    origin: JSON,
) -> None:
    """The array first: without its description it is not accepted for this set."""
    _check_name(path, str(path))
    write_array(path, array)
    description: dict[str, JSON] = {
        "format": FORMAT,
        "content": content,
        "fingerprint": whole.fingerprint,
        "images": len(whole),
        "class_names": class_names,
        "origin": origin,
        "sha256": sha256_of(path),
    }
    write_json(path.with_suffix(".json"), description)


def _read_description(path: Path, content: Content, index: ShardIndex, *, where: str) -> _Description:
    """FILE.json of FILE.npy; DataError if it is missing, or says that the file is something else."""
    _check_name(path, where)
    beside = path.with_suffix(".json")
    if not path.is_file():
        raise DataError(f"{where}: there is no such file.")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        names = found["class_names"]
        description = _Description(str(found["sha256"]), None if names is None else tuple(map(str, names)))
        format, what, fingerprint = found["format"], found["content"], str(found["fingerprint"])
    except FileNotFoundError:
        raise DataError(
            f"{where} needs '{beside.name}' next to it, which says what set of images it belongs to. Write both with "
            "write_keep or write_labels of ssl_pipeline.data.subset."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: '{beside}' does not describe such a file. Write both again.") from None
    if format != FORMAT:
        raise DataError(f"{where}: '{beside}' has format {format}, but {FORMAT} is needed. Write both again.")
    if what != content:
        raise DataError(
            f"{where} must hold {IN_WORDS[content]}. '{beside}' says that it holds {IN_WORDS.get(what, what)}."
        )
    if fingerprint != index.fingerprint:
        raise DataError(
            f"{where} was made for other images than those of '{index.called}' (fingerprint {fingerprint[:8]}, here "
            f"{index.fingerprint[:8]}). Make it again, or take the shards that it was made for."
        )
    if description.sha256 != sha256_of(path):
        raise DataError(f"{where} is not the file that '{beside}' describes: its SHA-256 differs. Write both again.")
    return description


def _check_name(path: Path, where: str) -> None:
    if path.suffix != ".npy":
        raise DataError(f"{where} must be an .npy file; its description is next to it, FILE.json of FILE.npy.")


def _load(path: Path, where: str) -> NDArray:
    is_small = path.stat().st_size < SMALL  # maybe empty, and then it cannot be mapped
    array = read_array(path, mapped=not is_small)
    if array is None:
        raise DataError(f"{where} is not an array of numbers in numpy's format (pickles are not read).")
    return array

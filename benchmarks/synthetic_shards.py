"""Sets of many shards in little time and space: one small image, and an index that names it again and again."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import webdataset

from ssl_pipeline.data.shards.catalogue import INDEX_DIRECTORY, Catalogue, write_catalogue, write_rows
from ssl_pipeline.data.shards.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.rows import index_shard
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.data.shards.verification import status_of
from ssl_pipeline.files import sha256_of_bytes

LINKS = 30_000  # names of one file, of the 65,000 that ext4 allows
PIXELS = 16


def write_synthetic_shards(folder: Path, *, shards: int, samples: int) -> None:
    """`shards` tar files of one image each, with a manifest, and an index that finds the image `samples` times in each.

    As many files, names, rows and checksums as a real set has, so that starting and finding samples cost what they
    would cost there. Verifying their content would show that the index is made up.
    """
    place = folder / INDEX_DIRECTORY
    place.mkdir(parents=True)
    tar = io.BytesIO()
    with webdataset.TarWriter(tar, mtime=0) as shard:
        shard.write({"__key__": "0", "jpg": np.full((PIXELS, PIXELS, 3), 128, dtype=np.uint8), "cls": 0})
    names = [f"train-{shard:06d}.tar" for shard in range(shards)]
    for name in names:
        (folder / name).write_bytes(tar.getvalue())
    entry, rows = index_shard(folder / names[0])
    repeated = np.repeat(rows, samples, axis=0)
    for shard, name in enumerate(names):
        if shard % LINKS == 0:
            write_rows(place, name, repeated)
        else:
            os.link(place / f"{names[shard - shard % LINKS]}.npy", place / f"{name}.npy")
    sizes, times = status_of(folder, names)
    counts = np.full(shards, samples, dtype=np.int64)
    checksums = tuple(sha256_of_bytes(name.encode()) for name in names)
    widest = np.full(shards, entry.widest, dtype=np.int64)
    image_bytes, pixel_bytes = counts * entry.image_bytes, counts * entry.pixel_bytes
    none, nothing = np.zeros(shards, dtype=np.int64), ("",) * shards
    table = ShardTable(
        tuple(names), sizes, times, checksums, counts, counts, image_bytes, pixel_bytes, widest, none, none, nothing
    )
    write_catalogue(place, Catalogue(table))
    listed = [ManifestShard(name, samples, entry.bytes, sha) for name, sha in zip(names, checksums, strict=True)]
    write_manifest(folder, Manifest(["only"], listed))

"""Sets of many shards in little time and space, and what a process of its own reports of one.

A module apart, since its imports are part of what is measured.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.shards.catalogue import INDEX_DIRECTORY, Catalogue, write_catalogue, write_rows
from ssl_pipeline.data.shards.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.rows import index_shard
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.data.shards.verification import status_of
from ssl_pipeline.data.stream import DataConfig, open_stream
from ssl_pipeline.files import sha256_of_bytes

LINKS = 30_000  # names of one file, of the 65,000 that ext4 allows
PIXELS = 16
BATCH_SIZE = 64


def write_made_up_shards(folder: Path, *, shards: int, samples: int) -> None:
    """`shards` tar files of one image each, with a manifest, and an index that finds the image `samples` times in each.

    As many files, names, rows and checksums as a real set has, so that starting and finding samples cost what they
    would cost there. Verifying their content would show that the index is made up.
    """
    from webdataset import TarWriter  # which a start does not import

    place = folder / INDEX_DIRECTORY
    place.mkdir(parents=True)
    tar = io.BytesIO()
    with TarWriter(tar, mtime=0) as shard:
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
    images, pixels = samples * entry.image_bytes, samples * entry.pixel_bytes
    entry = replace(entry, samples=samples, labelled=samples, image_bytes=images, pixel_bytes=pixels)
    of_files = zip(names, *(column.tolist() for column in status_of(folder, names)), strict=True)
    entries = [
        replace(entry, name=name, bytes=size, modified_ns=modified, sha256=sha256_of_bytes(name.encode()))
        for name, size, modified in of_files
    ]
    write_catalogue(place, Catalogue(ShardTable.of(entries)))
    listed = [ManifestShard(entry.name, samples, entry.bytes, entry.sha256) for entry in entries]
    write_manifest(folder, Manifest(["only"], listed))


def report_start_up(folder: str, begin: str) -> None:
    """Print, as JSON, the seconds since `begin` until the set is open, and those until there is a batch."""
    imported, imported_cpu = time.monotonic(), time.process_time()
    index = open_shards(folder)
    opened, opened_cpu = time.monotonic(), time.process_time()
    batches = batches_of(index, workers=1)
    next(batches)
    row = {
        "seconds": opened - float(begin),
        "open_seconds": opened - imported,
        "first_batch_seconds": time.monotonic() - opened,
        "cpu_seconds": opened_cpu,
        "open_cpu_seconds": opened_cpu - imported_cpu,
    }
    print(json.dumps(row))


def report_memory(folder: str, batches: str) -> None:
    """Print, as JSON, what /proc says of a worker: resident, and what of it is no other process's."""
    stream = batches_of(open_shards(folder), workers=1)
    for _ in range(int(batches)):
        next(stream)
    own = Path("/proc/self/task")
    (worker,) = [int(pid) for task in own.iterdir() for pid in (task / "children").read_text().split()]
    lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:]
    megabytes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    own_megabytes = megabytes["Private_Clean"] + megabytes["Private_Dirty"]
    print(json.dumps({"resident_megabytes": megabytes["Rss"], "own_megabytes": own_megabytes}))


def batches_of(
    index: ShardIndex, *, workers: int = 0, rank: int = 0, world_size: int = 1, batches: int | None = None
) -> Iterator[StreamBatch]:
    """Small views of a set, as one rank gets them."""
    groups = {"view": ViewGroup(count=2, size=16)}
    config = DataConfig(shards="", batch_size=BATCH_SIZE, workers=workers)
    return open_stream(index, groups, config, seed=0, position=0, rank=rank, world_size=world_size, batches=batches)

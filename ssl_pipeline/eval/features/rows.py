"""Features as a file that other programs read: CSV, Parquet, or numpy's .npz."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import tee
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.origins import origins_of
from ssl_pipeline.files import written_whole

VALUES_PER_GROUP = 2**23  # features that are held at once: 32 MB of float32
NO_LABEL = -1


def write_csv(path: Path, index: ShardIndex, features_ND: Tensor, labels_N: Tensor) -> None:
    """The rows of `write_parquet` as text, with 9 digits of float32 that lose nothing; empty where there is none."""
    features, names, classes = _array(features_ND), names_of(index), index.class_names
    header = ["key", "sample_id", "file", "label", *([] if classes is None else ["name"])]
    header += [f"feature_{place}" for place in range(features.shape[1])]
    with written_whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for sample, ((key, origin), label) in enumerate(zip(names, labels_N.tolist(), strict=True)):
            values = (f"{value:.9g}" for value in features[sample].tolist())
            name = [] if classes is None else [class_of(label, classes)]
            writer.writerow([key, sample, origin, "" if label == NO_LABEL else label, *name, *values])


def write_parquet(path: Path, index: ShardIndex, features_ND: Tensor, labels_N: Tensor) -> None:
    """A row per image: key, sample_id, file, label, name, feature_0 ... feature_D-1.

    `file` is what the image was made from, `label` its class by its number; null where there is none. `name` is what
    the class is called; there is no such column where classes have no names. Memory: one group of rows.
    """
    import pyarrow as pa
    from pyarrow import parquet

    features, dim, classes = _array(features_ND), features_ND.shape[1], index.class_names
    of_feature = pa.float16() if features.dtype == np.float16 else pa.float32()
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("sample_id", pa.int64()),
            ("file", pa.string()),
            ("label", pa.int64()),
            *([] if classes is None else [("name", pa.string())]),
            *((f"feature_{number}", of_feature) for number in range(dim)),
        ]
    )
    group = max(1, VALUES_PER_GROUP // dim)
    named = names_of(index)
    with written_whole(path) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
        for first in range(0, len(features), group):
            rows = np.ascontiguousarray(features[first : first + group].T)  # a column is contiguous in Parquet
            names = [next(named) for _ in range(rows.shape[1])]
            labels = labels_N[first : first + group].numpy()
            columns = [
                pa.array([key for key, _ in names], pa.string()),
                pa.array(np.arange(first, first + len(names), dtype=np.int64)),
                pa.array([file for _, file in names], pa.string()),
                pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
                *(
                    []
                    if classes is None
                    else [pa.array([class_of(label, classes) for label in labels.tolist()], pa.string())]
                ),
                *(pa.array(column) for column in rows),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=group)


def write_npz(path: Path, index: ShardIndex, features_ND: Tensor, labels_N: Tensor) -> None:
    """Arrays key, sample_id, file (empty if unknown), label (-1 for none), (N,) each, features (N, D) and, where
    classes have names, name (N,), empty for none.
    """
    names = list(names_of(index))
    arrays: dict[str, NDArray] = {
        "key": np.array([key for key, _ in names], dtype=np.str_),
        "sample_id": np.arange(len(names), dtype=np.int64),
        "file": np.array([file or "" for _, file in names], dtype=np.str_),
        "label": labels_N.numpy(),
        "features": _array(features_ND),
    }
    if index.class_names is not None:
        named = [class_of(label, index.class_names) or "" for label in labels_N.tolist()]
        arrays["name"] = np.array(named, dtype=np.str_)
    with written_whole(path) as aside, ZipFile(aside, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # numpy's savez takes no array `file`
                np.lib.format.write_array(member, array, allow_pickle=False)


def names_of(index: ShardIndex) -> Iterator[tuple[str, str | None]]:
    """Key and file of each image, in order."""
    keys, again = tee(index.key(sample) for sample in range(len(index)))
    return zip(keys, origins_of(index.folder, again), strict=True)


def class_of(label: int, names: Sequence[str]) -> str | None:
    """What the class of a label is called; None without a label, or for one that has no name."""
    return names[label] if 0 <= label < len(names) else None


def _array(features_ND: Tensor) -> NDArray:
    """The features without a copy."""
    assert features_ND.dtype in (torch.float32, torch.float16)
    return features_ND.numpy()

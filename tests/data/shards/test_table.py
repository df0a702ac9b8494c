import pickle

import numpy as np
import pytest

from ssl_pipeline.data.shards.rows import ShardEntry
from ssl_pipeline.data.shards.table import ShardTable

ENTRIES = [
    ShardEntry("a.tar", 10, 2**60 + 1, "f" * 64, 3, 2, 9, 2**50, 70),
    ShardEntry("b\udcff.tar", 0, 1, "0" * 64, 0, 0, 0, 0, 0),
]


def test_columns_and_entries_are_two_forms_of_the_same() -> None:
    table = ShardTable.of(ENTRIES)
    assert list(table) == ENTRIES
    assert list(ShardTable.from_columns(table.columns())) == ENTRIES
    assert table.columns()["modified_ns"] == [2**60 + 1, 1]
    assert len(ShardTable.of([])) == 0


@pytest.mark.parametrize(
    "change",
    [{"name": ["a.tar"]}, {"name": [1, 2]}, {"bytes": ["x", "y"]}, {"samples": None}, {"sha256": [None, None]}],
)
def test_columns_that_make_no_table_are_refused(change: dict[str, list]) -> None:
    with pytest.raises((TypeError, ValueError)):
        ShardTable.from_columns(ShardTable.of(ENTRIES).columns() | change)
    incomplete = ShardTable.of(ENTRIES).columns()
    del incomplete["labelled"]
    with pytest.raises(KeyError):
        ShardTable.from_columns(incomplete)


def test_a_worker_gets_arrays_whatever_the_number_of_samples() -> None:
    few, many = (
        ShardTable.of([ShardEntry("a.tar", 1, 1, "f" * 64, samples, samples, 1, 1, 1)] * 16) for samples in (1, 10**6)
    )
    assert len(pickle.dumps(few)) == len(pickle.dumps(many))
    assert few.samples.nbytes == many.samples.nbytes == 16 * np.dtype(np.int64).itemsize

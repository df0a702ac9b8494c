"""Processes that are started anew on one launcher's store read nothing of those before them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from torch.distributed import HashStore

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import store_of_this_start


def store_of_all(store: HashStore, number: int) -> str:
    """What all ranks find where the first has written, of processes that start together; it is of this start alone."""
    with ThreadPoolExecutor(number) as pool:
        stores = list(pool.map(lambda rank: store_of_this_start(store, rank, number, seconds=20), range(number)))
    assert not any(one.check(["address"]) for one in stores)
    address = uuid4().hex
    stores[0].set("address", address)
    assert {one.get("address").decode() for one in stores} == {address}
    return address


def test_processes_that_start_anew_never_read_what_the_dead_ones_wrote():
    store = HashStore()
    before = store_of_all(store, 4)
    store.set("asks/1", "of one that died before it joined")

    after, again = store_of_all(store, 3), store_of_all(store, 3)

    assert len({before, after, again}) == 3


def test_processes_that_do_not_come_are_named():
    with pytest.raises(ConfigError, match=r"3 of 4 processes have not come for 0\.1 s; the first of them is rank 1"):
        store_of_this_start(HashStore(), 0, 4, seconds=0.1)


def test_a_first_process_that_never_answers_is_told():
    with pytest.raises(ConfigError, match=r"The first process has not answered rank 2 for 0\.1 s"):
        store_of_this_start(HashStore(), 2, 4, seconds=0.1)

"""Processes whose weights part are found out, with the step and the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.config import RunError
from ssl_pipeline.distributed import rank
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.rank_checks import SLAB, RankChecks, hash_of
from tests.ranks import run_on_ranks, start_ranks
from tests.runs import make_run
from tests.tiny import CNN, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_each_element_and_its_place_count(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    hashes = {int(hash_of(tensor))}
    for place in range(15):
        other = tensor.clone()
        other.view(-1)[place] = 1 - other.view(-1)[place].int()
        hashes.add(int(hash_of(other)))
    assert len(hashes) == 16
    assert int(hash_of(tensor.clone())) == int(hash_of(tensor))


def test_the_last_bit_counts_and_so_does_the_order():
    tensor = torch.arange(6, dtype=torch.float32)
    bit = tensor.clone()
    bit.view(torch.int32)[3] += 1
    assert len({int(hash_of(each)) for each in (tensor, bit, tensor.flip(0), tensor[:5], -tensor)}) == 5


def test_slabs_are_one_tensor(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = int(hash_of(tensor))
    monkeypatch.setattr("ssl_pipeline.training.rank_checks.SLAB", 7)
    assert SLAB > 1000
    assert int(hash_of(tensor)) == whole


class Parts:
    """A monitor that changes one weight of one rank after a step."""

    every = Duration(1)

    def __init__(self, name: str, *, step: int) -> None:
        self.name, self.step = name, step
        self.method: nn.Module

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        if progress.step == self.step and rank() == 1:
            tensor = self.method.state_dict()[self.name]
            tensor[(0,) * tensor.ndim] += 1e-6
        return {}


def refusal(output: Path, shards: Path, name: str, check_ranks: int) -> str:
    parts = Parts(name, step=3)
    run = make_run(
        output, "dino", shards, backbone=CNN, batch_size=4, check_ranks=check_ranks, monitors=[parts], save_every=100
    )
    parts.method = run.method
    try:
        train(run)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["teacher.network.backbone.model.conv1.weight", "centre.value"])
def test_a_weight_that_parts_is_named_with_its_step(tmp_path, shards, name):
    first, second = (child.result() for child in start_ranks(refusal, tmp_path / "run", shards, name, 2))
    assert first == second
    assert first.startswith(
        f"The processes have diverged: after step 4 '{name}' of rank 1 differs from that of rank 0 ("
    )
    assert "last known to be equal after step 2" in first


def test_nothing_is_looked_at_where_it_is_switched_off(tmp_path, shards):
    for child in start_ranks(refusal, tmp_path / "run", shards, "centre.value", 0):
        assert child.result() == ""


def looks(every: int) -> bool:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for buffer in network.buffers():
        buffer += rank()  # statistics are each rank's own
    torch.manual_seed(0)
    nn.init.normal_(network[0].weight)
    nn.init.zeros_(network[0].bias)
    RankChecks(network, every=every).look(4)
    return True


def test_statistics_of_batch_norm_are_each_ranks_own():
    assert run_on_ranks(looks, 2) == [True, True]


def test_a_process_alone_has_nothing_to_compare():
    RankChecks(nn.Linear(2, 2), every=1).look(1)

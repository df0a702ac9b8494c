"""What grows with images and processes is measured in pieces that fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cost_growth import (
    CostGrowthConfig,
    count_collectives,
    count_state,
    group_of,
    main,
    measure_checkpoint,
    measure_order,
)
from ssl_pipeline.losses.assignment import sinkhorn_knopp


def test_the_memory_of_an_order_grows_with_shards_and_not_with_images():
    small, large = measure_order(100_000), measure_order(1_000_000)
    assert (small["shards"], large["shards"]) == (100, 1000)
    assert large["memory_mb"] < 4 * small["memory_mb"] < 4
    assert large["index_on_disk_gb"] == 0.048


def test_weights_are_counted_without_being_made():
    row = count_state("dino_vits16", mb_per_s=500.0)
    assert row["network"] == "dino, vit_small_patch16_224"
    assert 40 < row["trained_m"] < 45, "21.7 M of the ViT, the rest of the head"
    assert row["gradients_mb"] == pytest.approx(4 * row["trained_m"])
    student_and_teacher = 2 * (2 * 2 * row["trained_m"] + row["trained_m"])  # in bf16, large and small crops
    assert row["sharded_mb"] == pytest.approx(student_and_teacher + 4 * row["trained_m"], rel=1e-3)
    assert row["checkpoint_s"] == pytest.approx(2 * row["checkpoint_gb"])


def test_collectives_of_simclr_grow_with_the_processes_and_those_of_dino_do_not():
    simclr = [count_collectives("digits_simclr", number) for number in (1, 2, 4)]
    assert simclr[0]["calls"] == 0
    assert simclr[2]["megabytes"] > 1.5 * simclr[1]["megabytes"] > 0
    dino = [count_collectives("digits_dino", number) for number in (2, 4)]
    assert dino[0]["megabytes"] == dino[1]["megabytes"] > 0


def test_sinkhorn_knopp_sends_as_much_on_many_processes_as_on_two():
    sent = {}
    for processes in (2, 256):
        with group_of(processes) as sent[processes]:
            sinkhorn_knopp(torch.rand(6, 50), epsilon=0.05, num_iterations=3)
    assert sent[2] == sent[256] == 6 * [200]


def test_a_checkpoint_is_timed(tmp_path):
    assert min(measure_checkpoint(tmp_path, 2).values()) > 0


@pytest.mark.slow
def test_the_command_writes_all_tables(tmp_path, capsys):
    config = CostGrowthConfig(
        images=(10_000,), shards=(4,), processes=(1, 2), recipes=("digits_dino",), megabytes=1, output=Path(tmp_path)
    )
    main(config)
    found = json.loads((tmp_path / "cost_growth.json").read_text())
    assert {"order", "index", "checkpoint", "state", "collectives"} < found.keys()
    assert "collectives" in capsys.readouterr().out

"""What the log says of the loader is true, and helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.training.loader_advice import LoaderWatch, Supply, loader_advice, supply_of
from tests.tiny import write_shards


def said(waits: list[float], *, steps: int = 50) -> list[str | None]:
    watch = LoaderWatch(lambda: "Do this.")
    return [watch.observe(steps=steps, seconds=2.0, data_wait=wait) for wait in waits]


def test_the_bottleneck_is_named_once_and_again_when_it_changes():
    slow = "The loader is the bottleneck: {} of the last 50 steps' time was spent waiting for images. Do this."
    fast = "The loader keeps up now: {} of the last 50 steps' time was spent waiting for images."
    waits = [0.02, 0.02, 0.30, 0.40, 0.08, 0.30, 0.01, 0.02, 0.11]
    assert said(waits) == [
        *(None, None, slow.format("30%"), None),
        *(None, None),  # between the two limits nothing changes
        *(fast.format("1%"), None, slow.format("11%")),
    ]


def test_the_start_of_a_run_is_no_bottleneck():
    assert said([0.9, 0.02, 0.02]) == [None, None, None]


def test_one_slow_batch_is_no_bottleneck():
    assert said([0.0, 0.9, *[0.0] * 9], steps=1) == [None] * 11
    (sentence,) = [sentence for sentence in said([0.0, *[0.3] * 10], steps=1) if sentence]
    assert sentence.startswith("The loader is the bottleneck: 30% of the last 10 steps' time")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def advice(device: torch.device = GPU, *, settings: dict[str, object] | None = None, **facts: object) -> str:
    supply = Supply(cores=16, is_remote=False, stored_bytes=40_000, decoded_bytes=10**12, free_bytes=10**11)
    return loader_advice(
        DataConfig(shards="images", batch_size=8, **{"workers": 15} | (settings or {})),
        replace(supply, **facts),
        device,
    )


def test_idle_cores_become_workers():
    assert advice(settings={"workers": 4}) == (
        "What helps: data.workers=15 (16 cores per training process, 4 workers now)."
    )


def test_a_gpu_can_take_the_cropping():
    assert advice(settings={"crop_on": "worker"}) == "What helps: data.crop_on=device (workers only decode)."
    assert "crop_on" not in advice(CPU, settings={"crop_on": "worker"})
    assert "crop_on" not in advice(GPU)


def test_small_sets_can_stay_decoded():
    assert advice(decoded_bytes=1.5e8) == "What helps: data.cache=true (all images take 0.15 GB decoded)."
    assert "cache" not in advice(decoded_bytes=1.5e8, free_bytes=4 * 10**8)
    assert "decoded already" in advice(settings={"cache": True})


def test_large_images_can_be_packed():
    text = advice(stored_bytes=110_000)
    assert text.startswith("What helps: shards packed by data_tools.make_shards with short_side=320 quality=90")
    assert text.endswith("(an image takes 110 kB now).")


def test_remote_shards_can_be_asked_for_earlier():
    assert advice(is_remote=True) == "What helps: data.prefetch=8 (remote shards come unevenly)."


def test_several_settings_stand_in_one_sentence():
    text = advice(settings={"workers": 0, "crop_on": "worker"})
    assert text.startswith("What helps: data.workers=15 (16 cores per training process, 0 workers now); data.crop_on=")


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (2, 2), (1.5, 0)])
def test_no_core_is_promised_that_is_not_there(cores, workers):
    text = advice(CPU, settings={"workers": workers}, cores=cores)
    assert text == f"All {cores:g} cores of this training process are in use; more of them would help."


def test_what_is_known_of_the_images(tmp_path):
    index = open_shards(write_shards(tmp_path / "shards"))
    total = sum(len(index.read(number).image) for number in range(48))
    index = open_shards(tmp_path / "shards")
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()  # nothing is read, nor fetched, to be weighed
    supply = supply_of(index, CPU)
    assert supply.stored_bytes == total / 48
    assert supply.decoded_bytes == 48 * 3 * 12 * 10
    assert supply.free_bytes > 0
    index.source = "s3://bucket/train"
    remote = supply_of(index, CPU)
    assert remote == replace(supply, is_remote=True, free_bytes=remote.free_bytes)  # which changes all the time

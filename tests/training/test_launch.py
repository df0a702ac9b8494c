"""The environment does not change a recipe: what variables of Accelerate ask for is ignored by name, and said."""

from __future__ import annotations

import os

import pytest
from accelerate.utils import DistributedType

from ssl_pipeline.config import validate
from ssl_pipeline.training.launch import describe_launch, ignored_variables, start_accelerator
from ssl_pipeline.training.run import TrainConfig

LEFT_OVER = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_DYNAMO_MODE": "nonsense",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_VERSION": "2",
}
SET_BY_EVERY_LAUNCH = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
}


def config(**train: object) -> TrainConfig:
    return validate(TrainConfig, {"steps": 1, **train})


@pytest.fixture(params=LEFT_OVER)
def left_over(request, monkeypatch) -> str:
    monkeypatch.setenv(request.param, LEFT_OVER[request.param])
    return request.param


def test_a_variable_that_is_left_over_changes_nothing_and_is_named(left_over):
    assert ignored_variables(os.environ, config())[0].startswith(f"{left_over}={LEFT_OVER[left_over]}")
    accelerator = start_accelerator(config())
    assert accelerator.distributed_type == DistributedType.NO
    assert accelerator.device.type in ("cpu", "cuda")
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    assert accelerator.state.dynamo_plugin.backend.value.lower() == "no"


def test_the_key_that_does_it_is_named():
    assert ignored_variables({"ACCELERATE_MIXED_PRECISION": "bf16"}, config()) == [
        "ACCELERATE_MIXED_PRECISION=bf16 (set train.precision instead)"
    ]


def test_what_every_launch_sets_or_the_recipe_says_too_is_no_news():
    assert ignored_variables(SET_BY_EVERY_LAUNCH, config(precision="bf16")) == []
    assert ignored_variables({"ACCELERATE_MIXED_PRECISION": "bf16"}, config(precision="bf16")) == []


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_second_run_in_a_process_has_its_own_precision(precision):
    for each in ("bf16", "no", precision):
        assert start_accelerator(config(precision=each)).mixed_precision == each


def test_the_choice_of_a_cpu_is_kept_and_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    accelerator = start_accelerator(config())
    assert accelerator.device.type == "cpu"
    assert describe_launch(accelerator, config(accumulate=2, precision="bf16")) == (
        "1 process on cpu (ACCELERATE_USE_CPU), precision bf16, 2 micro-batches per step, no sharding, not compiled"
    )

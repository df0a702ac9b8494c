"""A step never makes the host wait for its device, and may be measured without being changed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.stream import StreamBatch, open_stream
from ssl_pipeline.optim.optimizer import build_optimizer
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.schedule import Schedule
from ssl_pipeline.training.run import Run
from ssl_pipeline.training.step import TrainingStep
from ssl_pipeline.training.step_checks import StepChecks, lag_on
from tests.runs import make_run
from tests.tiny import CONFIGS, write_shards

NAMES = sorted(CONFIGS)
LARS = {"name": "lars", "lr": {"value": 0.1}}  # fused optimizers do not know the meta device
ALL_AUGMENTATIONS = {"blur_prob": 0.5, "solarize_prob": 0.5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


class NeverRead(StepChecks):
    """Checks that stay where they are."""

    def add(self, *_: object, loss: Tensor, **__: object) -> None:
        self.loss = loss

    def read(self, *, lag: int = 0) -> int:
        return 0


def on_device(run: Run, device: str, checks: StepChecks, *, lag: int) -> TrainingStep:
    """The step of a run whose method and optimizer are on another device than Accelerate would choose."""
    run.method.to(device)
    run.accelerator = SimpleNamespace(
        device=torch.device(device),
        scaler=None,
        no_sync=lambda network: nullcontext(),
        backward=lambda loss: loss.backward(),
    )
    return TrainingStep(
        run,
        run.method,
        build_optimizer(run.method, run.optim),
        lr=Schedule(value=0.1),
        checks=checks,
        lag=lag,
        times=StepTimes(torch.device(device), every=0),
        bad_samples=BadSampleLog(run.output.path / "bad.jsonl", budget=0.0, total=len(run.index)),
        keepalive=lambda: None,
        requested=lambda: 0,
    )


def batches(run: Run, **settings: object) -> list[StreamBatch]:
    """Micro-batches for two steps, with their labelled ones."""
    run.data = run.data.model_copy(update=settings)
    masks = {needed.name: needed.mask for needed in run.method.needs if needed.mask is not None}
    options = {"masks": masks, "seed": 0, "position": 0, "rank": 0, "world_size": 1, "batches": 2}
    made = [batch.clone() for batch in open_stream(run.index, run.augment, run.data, **options)]
    for batch in made if any(views.labelled for views in run.method.needs) else ():
        batch.labelled = batch.clone()
    return made


@pytest.fixture
def meta(monkeypatch) -> str:
    """The device on which tensors have no values: whatever would wait for one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # autocast does not know that device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return "meta"


@pytest.mark.parametrize("crop_on", ["worker", pytest.param("device", marks=pytest.mark.other)])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_its_device_for_nothing(tmp_path, shards, meta, name, crop_on):
    run = make_run(tmp_path / "run", name, shards, batch_size=4, optim=LARS)
    run.augment = {group: view.model_copy(update=ALL_AUGMENTATIONS) for group, view in run.augment.items()}
    step = on_device(run, meta, checks := NeverRead(run.index), lag=1)
    stream = iter(batches(run, crop_on=crop_on))
    for number in range(2):
        result = step(stream, 4 * number)
    assert checks.loss.is_meta
    assert result.gradient_norm.is_meta


@pytest.mark.parametrize("look", [Tensor.tolist, Tensor.item, bool, Tensor.nonzero, Tensor.cpu, Tensor.numpy])
def test_the_meta_device_notices(look):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        look(torch.ones(3, device="meta").sum())


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's values decide what the host does next."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"), name
        return function(*arguments, **(options or {}))


def test_a_late_check_is_sent_without_a_look_at_it(tmp_path, shards):
    index = make_run(tmp_path / "run", "simclr", shards).index
    checks, values = StepChecks(index), torch.tensor([1.0, 2.0])
    with NoHostReads():
        for step in range(2):
            checks.add(
                step,
                loss=values[0],
                gradient_norm=values[1],
                sample_ids=torch.tensor([0, 1]),
                watched=values.sum(),
                signal_number=15 * step,
            )
    assert checks.read(lag=1) == 0
    assert checks.read() == 15


@pytest.mark.gpu
@pytest.mark.parametrize("crop_on", ["worker", "device"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_step_does_not_synchronise(tmp_path, shards, name, crop_on):
    run = make_run(tmp_path / "run", name, shards, batch_size=4)
    device = torch.device("cuda")
    run.augment = {group: view.model_copy(update=ALL_AUGMENTATIONS) for group, view in run.augment.items()}
    step = on_device(run, "cuda", StepChecks(run.index), lag=lag_on(device))
    step.times = StepTimes(device, every=1)
    made = [*batches(run, crop_on=crop_on), *batches(run)]
    step(iter(made), 0)  # chooses kernels, makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.times.start(1)
        for number in range(3):
            step.times.start(2 + number)
            step(iter(made), 4 + 4 * number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.checks.read() == 0
    assert step.times.read()["seconds_forward"] > 0

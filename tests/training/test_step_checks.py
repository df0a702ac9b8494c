"""A broken step and a signal are known to all, at the latest when something is kept."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.training.step_checks import BrokenStepError, StepChecks, lag_on
from tests.tiny import write_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return open_shards(write_shards(tmp_path_factory.mktemp("images") / "shards"))


def add(checks: StepChecks, step: int, *, loss: float = 1.0, gradient_norm: float = 1.0, signal_number: int = 0):
    checks.add(
        step,
        loss=torch.tensor(loss),
        gradient_norm=torch.tensor(gradient_norm),
        sample_ids=torch.arange(6) + step,
        watched=torch.tensor(loss) + torch.tensor(gradient_norm),
        signal_number=signal_number,
    )


def test_only_a_gpu_is_read_late():
    assert lag_on(torch.device("cpu")) == 0
    assert lag_on(torch.device("cuda")) == 1


def test_a_signal_is_heard_once_and_with_a_lag_one_step_later(index):
    checks = StepChecks(index)
    heard = []
    for step, signal_number in enumerate([0, 15, 0, 0]):
        add(checks, step, signal_number=signal_number)
        heard.append(checks.read(lag=1))
    assert heard == [0, 0, 15, 0]
    assert checks.read() == 0


def test_without_a_lag_the_step_itself_is_refused(index):
    checks = StepChecks(index)
    add(checks, 3, loss=float("nan"))
    with pytest.raises(BrokenStepError, match="Step 4 was not applied: on rank 0 the loss is nan") as error:
        checks.read()
    assert error.value.step == 3


def test_with_a_lag_the_sentence_is_about_the_step_that_broke(index):
    checks = StepChecks(index)
    add(checks, 3, loss=float("inf"), gradient_norm=2.0)
    assert checks.read(lag=1) == 0
    add(checks, 4, loss=float("nan"), gradient_norm=float("nan"))
    with pytest.raises(BrokenStepError) as error:
        checks.read(lag=1)
    sentence = str(error.value)
    assert sentence.startswith(
        "Step 4 was not applied: on rank 0 the loss is inf, and the gradient norm is 2. Images of "
    )
    assert [f"key '{number:04d}'" in sentence for number in (2, 3, 4, 5, 6, 7)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert "; and 2 more" in sentence


def test_a_gradient_breaks_a_step_too(index: ShardIndex):
    checks = StepChecks(index)
    add(checks, 0, gradient_norm=float("inf"))
    with pytest.raises(BrokenStepError, match="the loss is 1, and the gradient norm is inf"):
        checks.read()


def test_the_first_step_is_not_blamed_on_the_learning_rate(index):
    checks = StepChecks(index)
    add(checks, 0, gradient_norm=float("nan"))
    with pytest.raises(BrokenStepError, match=r"no learning rate has acted yet: look at train\.precision"):
        checks.read()
    add(checks, 1, gradient_norm=float("nan"))
    with pytest.raises(BrokenStepError, match=r"try a lower optim\.lr"):
        checks.read()

"""The training loop: repeatable, the same on one and on several processes, and stopped by what should stop it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.config import ConfigError, RunError, validate
from ssl_pipeline.data.stream import StreamBatch, open_stream
from ssl_pipeline.randomness import seed_everything
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.interruption import Interruption
from ssl_pipeline.run.step_times import PHASES
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training import batches, launch, loop, reporting
from ssl_pipeline.training.clock import Clock
from ssl_pipeline.training.launch import start_accelerator
from ssl_pipeline.training.loader_advice import Supply
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.run import TrainConfig, start_clock
from tests.ranks import start, start_ranks
from tests.runs import (
    SGD,
    Happening,
    equal,
    final_state,
    happens,
    losses,
    make_run,
    needs_labels,
    rows,
    trained,
    write_recipe,
)
from tests.tiny import CNN, CONFIGS, write_shards

NAMES = sorted(CONFIGS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


def train_alone(output: Path, name: str, shards: Path, *, float64: bool = False, **settings) -> dict[str, Tensor]:
    """The method's state after a run on this process, which writes to `output`."""
    output.mkdir()
    with RunDirectory(output) as directory, happens(Happening(float64=float64)):
        run = make_run(output, name, shards, directory=directory, **settings)
        run.method.to(torch.float64 if float64 else torch.float32)
        assert train(run) == 0
    return {name: tensor.clone() for name, tensor in run.method.state_dict().items()}


def gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of any two entries."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


class Recorder:
    """A monitor that notes what it is called with."""

    def __init__(self, every: int | str, *, name: str = "seen", look: Callable[[nn.Module], float] = lambda _: 1.0):
        self.every, self.name, self.look = Duration(every), name, look
        self.steps: list[int] = []

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        self.steps.append(progress.step)
        return {self.name: self.look(backbone)}


# Repeatable


def test_ten_seeded_steps_repeat_themselves(tmp_path, shards):
    first, second = (train_alone(tmp_path / run, "dino", shards, steps=10) for run in ("first", "second"))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert len(losses(tmp_path / "first")) == 10
    assert gap(first, second) == 0


def test_another_seed_gives_another_run(tmp_path, shards):
    for seed in (0, 1):
        train_alone(tmp_path / str(seed), "simclr", shards, steps=1, seed=seed)
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


def test_logging_and_saving_change_nothing(tmp_path, shards):
    often = train_alone(tmp_path / "often", "mae", shards, log_every=1, save_every=1, monitors=[Recorder(1)])
    seldom = train_alone(tmp_path / "seldom", "mae", shards, log_every=50, save_every="100%")
    assert gap(often, seldom) == 0
    assert losses(tmp_path / "seldom") == [losses(tmp_path / "often")[0], losses(tmp_path / "often")[-1]]


def test_model_randomness_depends_on_step_rank_and_micro_batch():
    draws = []
    for key in ((0, 3, 0, 0), (0, 3, 0, 0), (0, 4, 0, 0), (0, 3, 1, 0), (0, 3, 0, 1), (1, 3, 0, 0)):
        seed_everything(*key)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 5


def test_bfloat16_leaves_the_weights_in_float32(tmp_path, shards):
    recipe = write_recipe(tmp_path / "recipe.yaml", "dino", shards)
    argv = [f"recipe={recipe}", f"output={tmp_path / 'run'}", "train.precision=bf16", "train.steps=3"]
    state = start(trained, argv).result()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


# Accumulation


@pytest.mark.parametrize("name", ["dino", "fixmatch", "ibot", "moco"])
def test_two_micro_batches_are_one_batch_of_twice_the_size(tmp_path, shards, name):
    one = train_alone(tmp_path / "one", name, shards, batch_size=8, float64=True)
    two = train_alone(tmp_path / "two", name, shards, batch_size=4, accumulate=2, float64=True)
    assert gap(one, two) < 1e-8
    assert dict(losses(tmp_path / "one")) == pytest.approx(dict(losses(tmp_path / "two")), rel=1e-5)


@pytest.mark.parametrize("name", ["simclr", "moco_v3"])
def test_where_the_docstring_says_so_they_are_not(tmp_path, shards, name):
    one = train_alone(tmp_path / "one", name, shards, batch_size=8)
    two = train_alone(tmp_path / "two", name, shards, batch_size=4, accumulate=2)
    assert gap(one, two) > 1e-3


# Several processes


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_two_processes_is_that_on_one(tmp_path, shards, name):
    train_section = {"steps": 8, "save_every": 100, "log_every": 1, "hang_timeout": 0, "sync_batch_norm": True}
    train_section["check_ranks"] = 1
    recipe = write_recipe(tmp_path / "recipe.yaml", name, shards, optim=SGD, train=train_section)
    happening = Happening(float64=True)
    alone = start(trained, [f"recipe={recipe}", f"output={tmp_path / 'alone'}"], happening)
    together = [f"recipe={recipe}", f"output={tmp_path / 'together'}", "data.batch_size=4"]
    together += ["data.labelled.batch_size=2"] if needs_labels(name) else []
    first, second = (child.result() for child in start_ranks(trained, together, happening))
    assert gap(first, second) == 0
    assert gap(first, alone.result()) < 1e-8
    assert dict(losses(tmp_path / "together")) == pytest.approx(dict(losses(tmp_path / "alone")), rel=1e-5)


def statistics_that_monitors_see(output: Path, shards: Path) -> list[float]:
    seen: list[float] = []

    def look(backbone: nn.Module) -> float:
        seen.append(sum(float(buffer.double().sum()) for buffer in backbone.buffers()))
        return 0.0

    train(make_run(output, "simclr", shards, backbone=CNN, batch_size=4, steps=2, monitors=[Recorder(1, look=look)]))
    return seen


def test_monitors_of_all_ranks_see_the_batch_norm_statistics_of_the_first(tmp_path, shards):
    first, second = (c.result() for c in start_ranks(statistics_that_monitors_see, tmp_path / "run", shards))
    assert len(first) == 2
    assert first == second


# Monitors


def test_monitors_are_called_when_due_and_at_the_end(tmp_path, shards):
    monitors = [Recorder(5, name="each 5"), Recorder("1ep", name="each epoch"), Recorder("50%", name="each half")]
    train_alone(tmp_path / "run", "simclr", shards, log_every=50, monitors=monitors)  # 6 steps per epoch
    assert [monitor.steps for monitor in monitors] == [[5, 10, 12], [6, 12], [6, 12]]
    by_step = {row["step"]: row for row in rows(tmp_path / "run")}
    assert list(by_step) == [1, 5, 6, 10, 12], "a monitor's result stands in the row of its step, with the loss"
    assert {name for name in by_step[6] if "each" in name} == {"each epoch", "each half"}
    assert all("loss" in row and "feature_std" in row for row in by_step.values())


def test_monitors_leave_the_training_as_it_was(tmp_path, shards):
    def look(backbone: nn.Module) -> float:
        backbone.eval()
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, 16, 16))
        backbone.train()
        torch.rand(3)
        return float(features.sum())

    monitored = train_alone(tmp_path / "monitored", "mae", shards, steps=4, monitors=[Recorder(1, look=look)])
    assert gap(monitored, train_alone(tmp_path / "plain", "mae", shards, steps=4)) == 0


def test_each_batch_of_a_monitor_is_a_keepalive(tmp_path, shards, monkeypatch):
    signs = []
    monkeypatch.setattr(Interruption, "keepalive", lambda self: signs.append(1))
    counts = []

    def look(backbone: nn.Module) -> float:
        before = len(signs)
        for _ in range(5):
            backbone(torch.zeros(1, 3, 16, 16))
        counts.append(len(signs) - before)
        return 0.0

    train_alone(tmp_path / "run", "simclr", shards, steps=2, monitors=[Recorder(2, look=look)])
    assert counts == [5]


@pytest.mark.parametrize("name", ["simclr", "fixmatch"])
def test_filling_the_cache_gives_keepalives(tmp_path, shards, monkeypatch, name):
    signs = []
    monkeypatch.setattr(Interruption, "keepalive", lambda self: signs.append(1))
    train_alone(tmp_path / "plain", name, shards, steps=1)
    without = len(signs)
    signs.clear()
    train_alone(tmp_path / "cached", name, shards, steps=1, cache=True)
    assert len(signs) == without + (2 if name == "fixmatch" else 1), "one for each set that is decoded"


def test_a_stopped_run_is_saved_before_its_monitors_begin(tmp_path, shards):
    def look(backbone: nn.Module) -> float:
        return len(list((tmp_path / "run" / "checkpoints").glob("step-*")))

    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run") as directory, happens(Happening("SIGTERM", at=1)):
        assert train(
            make_run(tmp_path / "run", "simclr", shards, monitors=[Recorder(2, look=look)], directory=directory)
        )
    assert [row.get("seen") for row in rows(tmp_path / "run")] == [None, 1]


# What stops a run


def test_a_loss_that_is_not_a_number_changes_no_weight(tmp_path, shards):
    stopped = make_run(tmp_path / "stopped", "dino", shards)
    with happens(Happening("SIGTERM", at=2)):
        assert train(stopped) == 15
    broken = make_run(tmp_path / "broken", "dino", shards)
    with (
        happens(Happening("nan", at=3)),
        pytest.raises(RunError, match="Step 4 was not applied: on rank 0 the loss is nan"),
    ):
        train(broken)
    assert gap(broken.method.state_dict(), stopped.method.state_dict()) == 0


@pytest.fixture
def late(monkeypatch) -> None:
    """Checks are read one step late, as on a GPU."""
    monkeypatch.setattr(loop, "lag_on", lambda device: 1)


def steps_saved(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


@pytest.mark.other
def test_late_checks_change_nothing_in_a_run_that_goes_well(tmp_path, shards, monkeypatch):
    at_once = train_alone(tmp_path / "at once", "dino", shards, log_every=5)
    monkeypatch.setattr(loop, "lag_on", lambda device: 1)
    assert gap(at_once, train_alone(tmp_path / "late", "dino", shards, log_every=5)) == 0
    assert losses(tmp_path / "at once") == losses(tmp_path / "late")


@pytest.mark.parametrize(
    ("at", "log_every", "save_every", "rows_kept", "saved"),
    [
        (6, 50, 2, [1], [2, 4, 6]),  # step 7 breaks, is found out in step 8
        (7, 50, 2, [1], [2, 4, 6]),  # step 8 would have been saved
        (7, 4, 50, [1, 4], []),  # or logged
        (11, 50, 50, [1], []),  # the last step
    ],
)
def test_nothing_of_a_broken_step_is_kept(tmp_path, shards, late, at, log_every, save_every, rows_kept, saved):
    (tmp_path / "run").mkdir()
    sentence = f"^Step {at + 1} was not applied: on rank 0 the loss is nan, .* Images of its batch: .*; and 4 more"
    settings = {"log_every": log_every, "save_every": save_every, "keep_checkpoints": 9}
    with (
        RunDirectory(tmp_path / "run") as directory,
        happens(Happening("nan", at=at, record=tmp_path / "images")),
        pytest.raises(RunError, match=sentence) as error,
    ):
        train(make_run(tmp_path / "run", "simclr", shards, directory=directory, **settings))
    seen = [json.loads(line) for line in (tmp_path / "images.0").read_text().splitlines()]
    assert all(f"key '{image:04d}'" in str(error.value) for image in seen[at][:4]), "the images of the broken step"
    assert [row["step"] for row in rows(tmp_path / "run")] == rows_kept
    assert steps_saved(tmp_path / "run") == saved
    assert read_status(tmp_path / "run").step == at


def refusal(output: Path, shards: Path) -> str:
    with (
        mock.patch.object(loop, "lag_on", return_value=1),
        happens(Happening("nan", at=2, on_rank=1)),
        pytest.raises(RunError) as error,
    ):
        train(make_run(output, "simclr", shards, batch_size=4, log_every=50))
    return str(error.value)


def test_all_ranks_refuse_a_broken_step_late(tmp_path, shards):
    first, second = (child.result() for child in start_ranks(refusal, tmp_path / "run", shards))
    assert first == second
    assert first.startswith("Step 3 was not applied: on rank ")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_signal_is_obeyed_one_step_later_at_most(tmp_path, shards, late, log_every):
    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run") as directory, happens(Happening("SIGTERM", at=4)):
        settings = {"log_every": log_every, "save_every": 50}
        assert train(make_run(tmp_path / "run", "simclr", shards, directory=directory, **settings)) == 15
    assert steps_saved(tmp_path / "run") == [5 if log_every == 1 else 6]
    assert read_status(tmp_path / "run").state == "preempted"


def test_a_broken_step_after_a_signal_is_not_saved(tmp_path, shards, late):
    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run") as directory, happens(Happening("SIGTERM", at=4)):
        run = make_run(tmp_path / "run", "simclr", shards, log_every=50, save_every=50, directory=directory)
        parameter = next(run.method.backbone.parameters())
        count = itertools.count()
        parameter.register_hook(lambda gradient: gradient * torch.inf if next(count) == 5 else gradient)
        with pytest.raises(RunError, match="Step 6 was not applied"):
            train(run)
    assert steps_saved(tmp_path / "run") == []


def test_a_gradient_that_is_infinite_stops_the_run_too(tmp_path, shards):
    run = make_run(tmp_path / "run", "simclr", shards)
    before = {name: parameter.detach().clone() for name, parameter in run.method.named_parameters()}
    next(run.method.backbone.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        RunError, match=r"Step 1 was not applied: .* the loss is \d.*, and the gradient norm is (inf|nan)"
    ):
        train(run)
    assert all(torch.equal(run.method.get_parameter(name), tensor) for name, tensor in before.items())


def test_a_failure_is_told_in_the_status(tmp_path, shards):
    def look(backbone: nn.Module) -> float:
        raise RunError("no such luck")

    with pytest.raises(RunError, match="no such luck"):
        train_alone(tmp_path / "run", "simclr", shards, monitors=[Recorder(2, look=look)])
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()
    assert "no such luck" in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.parametrize("never", [0, "0ep", "0%"])
def test_a_period_of_zero_means_never_but_at_the_end(tmp_path, shards, never):
    monitor = Recorder(never)
    settings = {"steps": 5, "log_every": 0, "save_every": never, "time_steps": 0, "keep_checkpoints": 9}
    train_alone(tmp_path / "run", "simclr", shards, monitors=[monitor], **settings)
    assert steps_saved(tmp_path / "run") == monitor.steps == [5]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 5]


def test_a_run_is_saved_when_due_and_at_the_end(tmp_path, shards):
    train_alone(tmp_path / "run", "simclr", shards, steps=7, save_every=2, keep_checkpoints=9)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}" for step in (2, 4, 6, 7)]
    assert any(name.startswith("optimizer/") for name in final_state(tmp_path / "run"))


def test_what_a_kill_in_its_last_save_left_is_removed_from_a_complete_run(tmp_path, shards):
    with RunDirectory(tmp_path / "run") as directory:
        train(make_run(tmp_path / "run", "simclr", shards, steps=2, directory=directory))
    left = tmp_path / "run" / "checkpoints" / ".tmp-step-00000001-0123abcd"  # a superfluous checkpoint, half removed
    left.mkdir()
    before = final_state(tmp_path / "run")
    with RunDirectory(tmp_path / "run") as directory:
        assert train(make_run(tmp_path / "run", "simclr", shards, steps=2, directory=directory)) == 0
    assert not left.exists()
    assert equal(final_state(tmp_path / "run"), before)


# What is measured


@pytest.mark.other
def test_measuring_changes_no_loss(tmp_path, shards):
    settings = {"steps": 9, "log_every": 2}
    plain = train_alone(tmp_path / "plain", "mae", shards, **settings)
    measured = train_alone(tmp_path / "measured", "mae", shards, time_steps=2, profile=2, **settings)
    assert gap(plain, measured) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "measured")
    phases = {f"seconds_{phase}" for phase in PHASES}
    assert [phases <= row.keys() for row in rows(tmp_path / "measured")] == [False, True, True, True, True, False]
    assert not any(phases & row.keys() for row in rows(tmp_path / "plain"))
    (trace,) = (tmp_path / "measured" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert set(PHASES) <= {event.get("name") for event in events}


@pytest.mark.other
def test_the_log_tells_of_the_start_the_trace_and_the_parts_of_a_step(tmp_path, shards, capsys):
    train_alone(tmp_path / "run", "simclr", shards, steps=7, log_every=3, time_steps=1, profile=1)
    printed = capsys.readouterr().err
    assert re.search(
        r"First batch \d+\.\d s after the start: 0\.0 s for the index, \d+\.\d s for the batch itself\.", printed
    )
    assert "Trace of steps 6 to 6: " in printed
    assert re.search(r"A step took .* s on average over 6 measured steps: wait \d+\.\d%, copy ", printed)


def test_a_slow_loader_is_named_with_what_helps(tmp_path, shards, capsys, monkeypatch):
    seconds = itertools.count(step=0.001)
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))

    def slowly(*arguments: object, **options: object) -> Iterator[StreamBatch]:
        for batch in open_stream(*arguments, **options):
            for _ in range(10):
                next(seconds)
            yield batch

    monkeypatch.setattr(batches, "open_stream", slowly)
    supply = Supply(cores=8, is_remote=False, stored_bytes=0, decoded_bytes=0, free_bytes=0)
    monkeypatch.setattr(reporting, "supply_of", lambda index, device: supply)
    train_alone(tmp_path / "run", "simclr", shards, steps=23)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bottleneck" in line]
    assert line.endswith("What helps: data.workers=7 (8 cores per training process, 0 workers now).")


# Clock and start


def test_the_clock_follows_the_position_through_a_change_of_the_batch():
    clock = Clock(num_samples=100, global_batch=30, end=250)
    assert clock.progress(0) == Progress(step=0, total_steps=9, steps_per_epoch=100 / 30)
    assert clock.progress(60).epoch == pytest.approx(0.6)
    smaller = Clock(num_samples=100, global_batch=20, end=250)
    assert smaller.progress(60).step == 3
    assert smaller.progress(60).epoch == pytest.approx(0.6)


def test_a_run_has_steps_or_epochs(shards, tmp_path):
    run = make_run(tmp_path / "run", "simclr", shards, steps=None, epochs=1.5)
    clock = start_clock(run.index, run.data, run.train)
    assert (clock.end, clock.progress(0).total_steps) == (72, 9)
    for lengths in ({}, {"steps": 1, "epochs": 1}):
        with pytest.raises(ConfigError, match="set either epochs or steps"):
            validate(TrainConfig, dict(lengths))


def test_a_launcher_of_which_accelerate_sees_one_process_is_refused(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(launch, "join_processes", lambda backend: None)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(ConfigError, match="The launcher started 2 processes, but Accelerate sees 1"):
        start_accelerator(TrainConfig(steps=1))

"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

The whole state of a run is the method's and the optimizer's tensors and one number, the position in the endless stream
of samples. The step, the epoch and every schedule follow from it; randomness is seeded again in each step. So a run
that is killed at any moment goes on bit for bit from its newest checkpoint; on a GPU up to the order in which kernels
add: the backward passes of attention and of convolutions need not give the same bits twice there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Literal

import torch
from torch import nn

from ssl_pipeline.config import failure_sentence, printable
from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.modules.sync_batch_norm import synchronize_batch_norm
from ssl_pipeline.optim.gradient_norms import GradientNorms
from ssl_pipeline.optim.optimizer import build_optimizer
from ssl_pipeline.run.checkpoint_files import Checkpoint
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import read_status
from ssl_pipeline.run.interruption import Interruption
from ssl_pipeline.run.profiling import Profile
from ssl_pipeline.run.state import LoggedRow
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.run.tracking import Tracker
from ssl_pipeline.training.batches import announced, open_batches
from ssl_pipeline.training.compiling import compile_decision, compiles_colours, remove_half_written
from ssl_pipeline.training.failures import failures_of
from ssl_pipeline.training.parallel import wrap
from ssl_pipeline.training.rank_checks import RankChecks
from ssl_pipeline.training.reporting import Reporter
from ssl_pipeline.training.resume import begin_or_keep, load_newest, optimizer_identity
from ssl_pipeline.training.run import Run, resumed_clock
from ssl_pipeline.training.saving import export_run, save_run
from ssl_pipeline.training.sharding import Sharding
from ssl_pipeline.training.statistics import NormStatistics
from ssl_pipeline.training.step import TrainingStep
from ssl_pipeline.training.step_checks import BrokenStepError, StepChecks, lag_on


def train(run: Run) -> int:
    """Train to the end, from the newest checkpoint if there is one; returns the signal that cut it short, or 0."""
    method, device = run.method, run.accelerator.device
    if run.train.sync_batch_norm:
        synchronize_batch_norm(method, device)
    if not _is_sharded(run):  # else it may be too large
        method.to(device)
    optimizer = build_optimizer(method, run.optim)
    checkpoints = Checkpoints(run.output.path / "checkpoints", keep=run.train.keep_checkpoints, report=_say)
    identity = {**run.output.identity, **optimizer_identity(method, optimizer)}
    saved = load_newest(checkpoints, method, optimizer, run.output, device=device)
    if saved is not None:
        saved.tensors.clear()  # copied, and as large as the method and its optimizer
        run.clock = resumed_clock(run.clock, run.train, saved.state)
    clock, position = run.clock, saved.state.position if saved is not None else 0
    status = read_status(run.output.path)
    if run.output.directory is not None:
        checkpoints.remove_leftovers()  # a run that is complete saves no more
        with failures_of(run).explained():
            before = saved.state.global_batch if saved is not None else None
            begin_or_keep(run, run.output.directory, position=position, global_batch=before)
    if clock.is_last(position) and status is not None and status.state == "done":
        return 0
    network, optimizer, messages = _wrapped(run, optimizer, saved)
    tracker = Tracker(
        run.output.path,
        total_steps=clock.total_steps,
        first_step=clock.steps_made(position),
        resumed_position=position if saved is not None else -1,
        wandb=run.output.wandb,
        enabled=run.output.directory is not None,
    )
    if saved is not None:
        messages.append(f"Resuming after step {clock.steps_made(position)} from {saved.path}.")
    for message in messages:
        tracker.message(message)
    with Interruption(hang_timeout=run.train.hang_timeout) as interruption:
        loop = _Loop(run, checkpoints, tracker, network, optimizer, interruption, identity, saved=saved)
        interruption.note_hang = partial(loop.write_status, "failed")
        try:
            return loop.go(position)
        except BaseException as error:
            if isinstance(error, BrokenStepError):
                loop.position = clock.position_after(error.step)
            if isinstance(error, Exception):
                error = failures_of(run).explain(error)
            with suppress(OSError):  # of a full disk; the error itself is reported
                loop.write_status("failed", printable(failure_sentence(error)))
            raise error from None
        finally:
            tracker.close()


def _wrapped(
    run: Run, optimizer: torch.optim.Optimizer, saved: Checkpoint | None
) -> tuple[nn.Module, torch.optim.Optimizer, list[str]]:
    """The method and its optimizer as they train: compiled where that is worth it, sharded or replicated, with the
    scaler of the checkpoint; and what to tell about it."""
    device, steps, messages = run.accelerator.device, run.clock.total_steps, list[str]()
    colours = compiles_colours(device, steps=steps)
    if run.train.compile or colours:
        remove_half_written()
    compiles, why_not = compile_decision(run.train.compile, device, steps=steps)
    sharded = _is_sharded(run)
    if sharded:
        run.sharding = Sharding(run.method)
        optimizer = run.sharding.share_out(
            optimizer, run.optim, device=device, precision=run.train.precision, compiled=compiles
        )
    elif compiles:
        for part in run.method.parts_to_compile():
            part.compile(dynamic=False)  # each crop size by itself, else the second would be dynamic
    network, optimizer = wrap(run.accelerator, run.method, optimizer, sharded=sharded)
    if saved is not None and saved.state.scaler is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(saved.state.scaler)
    if run.train.compile == "auto":
        messages.append("The network is compiled." if compiles else f"The network is not compiled: {why_not}.")
    if colours:
        messages.append("The first step compiles the colours of the views, which takes a minute or two.")
    return network, optimizer, messages


def _is_sharded(run: Run) -> bool:
    return run.train.parallel == "fsdp" and world_size() > 1


class _Loop:
    """One pass from a position to the end of the run."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        tracker: Tracker,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        interruption: Interruption,
        identity: Mapping[str, str],
        *,
        saved: Checkpoint | None,
    ) -> None:
        self.saved = None if saved is None else saved.state
        self.run, self.clock, self.checkpoints, self.tracker = run, run.clock, checkpoints, tracker
        self.optimizer, self.interruption, self.identity = optimizer, interruption, identity
        self.position = 0
        skips = run.train.on_nan == "skip"
        self.checks = StepChecks(
            run.index,
            budget=run.train.nan_budget if skips else 0,
            left_out=0 if saved is None else saved.state.left_out_steps,
            say=tracker.message,
        )
        self.ranks = RankChecks(run.method, every=run.train.check_ranks)
        self.times = StepTimes(run.accelerator.device, every=run.train.time_steps)
        self.step = TrainingStep(
            run,
            network,
            optimizer,
            lr=run.optim.effective_lr(run.clock.global_batch),
            checks=self.checks,
            lag=0 if skips else lag_on(run.accelerator.device),
            times=self.times,
            bad_samples=BadSampleLog(
                run.output.path / "bad_samples.jsonl", budget=run.data.bad_sample_budget, total=len(run.index)
            ),
            keepalive=self._keepalive,
            requested=interruption.requested,
            statistics=NormStatistics(run.method) if skips else None,
            norms=GradientNorms(run.method) if run.train.gradient_norms else None,
            has_row=lambda position: self.reporter.is_due(position),
        )
        start = {} if saved is None else saved.state.start
        self.reporter = Reporter(run, tracker, self.times, self._keepalive, start=start)

    def go(self, position: int) -> int:
        """Step until the end of the run, and export it, or until a signal; returns the signal."""
        self.position = position
        with self.interruption.computing():
            if self.saved is not None:
                self.reporter.log_missing(self.saved.row, position)
            else:
                self.reporter.log_start()
        signal_number = 0
        if self.clock.is_last(position):  # cut off between the last checkpoint and the export
            self.tracker.message(f"Nothing is left to train; step {self.clock.steps_made(position)} is exported.")
        else:
            stream = open_batches(self.run, position, self._keepalive)
            with self._profile() as profile:
                signal_number = self._train(announced(stream, self.run, self.tracker.message), profile)
        if times := self.times.summary():
            self.tracker.message(times)
        if not signal_number:
            export_run(self.run, self.run.output.path, position=self.position)
            self.write_status("done")
        return signal_number

    def _train(self, stream: Iterator[StreamBatch], profile: Profile) -> int:
        self.reporter.start_interval()
        while not self.clock.is_last(self.position):
            step = self.clock.steps_made(self.position) + 1
            self.interruption.step = step
            self.times.start(step, named=profile.active)
            result = self.step(stream, self.position)
            self.position += self.clock.global_batch
            last = self.clock.is_last(self.position)
            save_due = last or self.clock.is_due(self.run.train.save_every, self.position)
            signal_number = result.signal_number
            if signal_number or save_due or self.reporter.is_due(self.position):
                signal_number = self.checks.read() or signal_number  # before anything of this step is logged or saved
            self.ranks.look(step)
            profile.step_done()
            row = self.reporter.begin(result, self.position)
            stopped = signal_number and not last
            if stopped or save_due:
                self._save(row)  # before the monitors: they may fail, or outlast the time that a preempted run has
            if stopped:
                self.write_status("preempted", f"signal {signal_number}")
            with self.interruption.computing() if row is not None else nullcontext():
                self.reporter.finish(row, self.position, result)
            if stopped:
                self.tracker.message(f"Stopped by signal {signal_number} after step {step}; run again to go on.")
                return signal_number
        return 0

    def _profile(self) -> Profile:
        return Profile(
            self.run.output.path / "profile",
            num_steps=self.run.train.profile if self.run.output.directory is not None else 0,
            first_step=self.clock.steps_made(self.position),
            device=self.run.accelerator.device,
            report=self.tracker.message,
        )

    def _save(self, row: LoggedRow | None) -> None:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]
        save_run(
            self.run,
            self.checkpoints,
            optimizer,
            position=self.position,
            identity=self.identity,
            row=row,
            start=self.reporter.start,
            left_out_steps=self.checks.left_out,
        )
        if self.run.output.directory is not None:
            self.run.output.directory.checkpoint = self.clock.steps_made(self.position)
            self.write_status("running")
            self.run.output.saved()

    def write_status(self, state: Literal["running", "done", "preempted", "failed"], reason: str = "") -> None:
        if self.run.output.directory is not None:
            self.run.output.directory.status(state, step=self.clock.steps_made(self.position), reason=reason)

    def _keepalive(self) -> None:
        self.interruption.keepalive()
        if self.run.output.directory is not None:
            self.run.output.directory.heartbeat(step=self.clock.steps_made(self.position))


def _say(text: str) -> None:
    if rank() == 0:
        print(printable(text), flush=True)

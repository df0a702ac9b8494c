"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

The whole state of a run is the method's and the optimizer's tensors and one number, the position in the endless stream
of samples. The step, the epoch and every schedule follow from it; randomness is seeded anew in each step. So a run that
is killed at any moment goes on bit for bit from its newest checkpoint; on a GPU up to the order in which kernels add:
the backward passes of attention and of convolutions need not give the same bits twice there.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.labelled import open_labelled_stream, with_labelled
from ssl_pipeline.data.stream import open_stream
from ssl_pipeline.distributed import peer_failure, rank, world_size
from ssl_pipeline.modules.sync_batch_norm import synchronize_batch_norm
from ssl_pipeline.optim.optimizer import build_optimizer
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.interruption import Interruption
from ssl_pipeline.run.optimizer_state import optimizer_tensors
from ssl_pipeline.run.profiling import Profile
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.run.tracking import Tracker
from ssl_pipeline.training.reporting import Reporter
from ssl_pipeline.training.resume import changed_settings, load_newest, optimizer_identity
from ssl_pipeline.training.run import Run
from ssl_pipeline.training.step import TrainingStep
from ssl_pipeline.training.step_checks import BrokenStepError, StepChecks, lag_on


def train(run: Run) -> int:
    """Train to the end, from the newest checkpoint if there is one; returns the signal that cut it short, or 0."""
    clock, method, device = run.clock, run.method, run.accelerator.device
    if run.train.sync_batch_norm:
        synchronize_batch_norm(method, device)
    method.to(device)
    optimizer = build_optimizer(method, run.optim)
    checkpoints = Checkpoints(run.output / "checkpoints", keep=run.train.keep_checkpoints, report=_say)
    identity = {**run.identity, **optimizer_identity(method, optimizer)}
    saved = load_newest(checkpoints, method, optimizer, run.identity)
    position = saved.position if saved is not None else 0
    if run.directory is not None:
        _write_settings(run.directory, run.settings, complete=position >= clock.end)
    if run.train.compile:
        for part in method.parts_to_compile():
            part.compile(dynamic=False)  # each crop size is compiled once; else the second would be dynamic
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers; Accelerate knows the old name alone
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        network, optimizer = run.accelerator.prepare(method, optimizer)
    if saved is not None and run.accelerator.scaler is not None and isinstance(saved.facts.get("scaler"), dict):
        run.accelerator.scaler.load_state_dict(saved.facts["scaler"])
    tracker = Tracker(
        run.output,
        total_steps=clock.progress(0).total_steps,
        resumed_position=position,
        global_batch=clock.global_batch,
        wandb=run.wandb,
        enabled=run.directory is not None,
    )
    if saved is not None and position < clock.end:
        tracker.message(f"Resuming after step {clock.progress(position).step} from {saved.path}.")
    with Interruption(hang_timeout=run.train.hang_timeout) as interruption:
        loop = _Loop(run, checkpoints, tracker, network, optimizer, interruption, identity)
        try:
            return loop.go(position)
        except BaseException as error:
            if isinstance(error, BrokenStepError):
                loop.position = error.step * clock.global_batch
            error = (isinstance(error, Exception) and peer_failure(error)) or error
            loop.write_status("failed", str(error) or type(error).__name__)
            raise error from None
        finally:
            tracker.close()


def _write_settings(directory: RunDirectory, settings: str, *, complete: bool) -> None:
    """Keep config.yaml true: say what a resumed run changes, and let a complete run keep what it was made with.

    Raises ConfigError if the settings end before the point that an unfinished run has reached.
    """
    path = directory.config_path
    changes = changed_settings(path.read_text(), settings) if path.exists() else []
    if complete and changes:
        status = read_status(directory.path)
        if status is None or status.state != "done":
            raise ConfigError(
                f"{directory.path} has an unfinished run that is past the end of these settings, which differ from its "
                f"own ({'; '.join(changes)}). Choose another output=DIR, or its own settings."
            )
        print(f"This run was made with other settings, which stand: {'; '.join(changes)}", flush=True)
    elif changes:
        print(f"Changed since the last start of this run: {'; '.join(changes)}", flush=True)
    if not complete:
        directory.write_config(settings)


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
    ) -> None:
        self.run, self.clock, self.checkpoints, self.tracker = run, run.clock, checkpoints, tracker
        self.optimizer, self.interruption, self.identity = optimizer, interruption, identity
        self.position = 0
        self.checks = StepChecks(run.index)
        self.times = StepTimes(run.accelerator.device, every=run.train.time_steps)
        self.step = TrainingStep(
            run,
            network,
            optimizer,
            lr=run.optim.effective_lr(run.clock.global_batch),
            checks=self.checks,
            lag=lag_on(run.accelerator.device),
            times=self.times,
            bad_samples=BadSampleLog(
                run.output / "bad_samples.jsonl", budget=run.data.bad_sample_budget, total=len(run.index)
            ),
            keepalive=self._keepalive,
            requested=interruption.requested,
        )
        self.reporter = Reporter(run, tracker, self.times, self._keepalive)

    def go(self, position: int) -> int:
        """Step until the end of the run or until a signal; returns the signal."""
        self.position = position
        stream = self._open_stream(position)
        if self.clock.is_last(position):
            self.tracker.message("The run is complete already; nothing is left to train.")
            status = read_status(self.run.output)
            if status is None or status.state != "done":  # cut off between the last checkpoint and this word
                self.write_status("done")
            return 0
        self.write_status("running")
        with self._profile() as profile:
            signal_number = self._train(self._announced(stream), profile)
        if times := self.times.summary():
            self.tracker.message(times)
        if not signal_number:
            self.write_status("done")
        return signal_number

    def _train(self, stream: Iterator[StreamBatch], profile: Profile) -> int:
        self.reporter.start_interval()
        while not self.clock.is_last(self.position):
            progress = self.clock.progress(self.position)
            self.times.start(progress.step + 1, named=profile.active)
            result = self.step(stream, progress)
            self.position += self.clock.global_batch
            last = self.clock.is_last(self.position)
            save_due = last or self.clock.is_due(self.run.train.save_every, self.position)
            signal_number = result.signal_number
            if signal_number or save_due or self.reporter.is_due(self.position):
                signal_number = self.checks.read() or signal_number  # before anything is told or kept of this step
            profile.step_done()
            if signal_number and not last:
                self._save()  # before the monitors, which may outlast the time that a preempted run is given
                self.write_status("preempted", f"signal {signal_number}")
                self.reporter.report(result, self.position)
                self.tracker.message(
                    f"Stopped by signal {signal_number} after step {progress.step + 1}; run again to go on."
                )
                return signal_number
            self.reporter.report(result, self.position)
            if save_due:
                self._save()
        return 0

    def _profile(self) -> Profile:
        return Profile(
            self.run.output / "profile",
            num_steps=self.run.train.profile if self.run.directory is not None else 0,
            first_step=self.clock.progress(self.position).step,
            device=self.run.accelerator.device,
            report=self.tracker.message,
        )

    def _announced(self, stream: Iterator[StreamBatch]) -> Iterator[StreamBatch]:
        """The stream; says how long its first batch took."""
        asked = time.perf_counter()
        first = next(stream)
        now = time.perf_counter()
        self.tracker.message(
            f"First batch {now - self.run.started:.1f} s after the start: "
            f"{self.run.index_seconds:.1f} s for the index, {now - asked:.1f} s for the batch itself."
        )
        yield first
        del first  # its memory is the stream's
        yield from stream

    def _open_stream(self, position: int) -> Iterator[StreamBatch]:
        """The micro-batches from a position to the end of the run, each with its labelled one if there is any."""
        run = self.run
        groups, masks = _read_groups(run, labelled=False)
        stream = open_stream(
            run.index,
            groups,
            run.data,
            masks=masks,
            seed=run.seed,
            position=position,
            rank=rank(),
            world_size=world_size(),
            accumulate=run.train.accumulate,
            batches=math.ceil((self.clock.end - position) / self.clock.global_batch) * run.train.accumulate,
            device=run.accelerator.device,
            keepalive=self._keepalive,
        )
        if run.labelled_index is None:
            return stream
        groups, masks = _read_groups(run, labelled=True)
        labelled = open_labelled_stream(
            run.labelled_index,
            groups,
            run.data,
            masks=masks,
            seed=run.seed,
            step=position // self.clock.global_batch,
            rank=rank(),
            world_size=world_size(),
            accumulate=run.train.accumulate,
            device=run.accelerator.device,
            keepalive=self._keepalive,
        )
        return with_labelled(stream, labelled)

    def _save(self) -> None:
        if self.run.directory is not None:
            scaler = self.run.accelerator.scaler
            facts = {
                **self.identity,
                "position": self.position,
                "global_batch": self.clock.global_batch,
                "versions": {"torch": torch.__version__},
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            optimizer: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]
            tensors = {"method": self.run.method.state_dict(), "optimizer": optimizer_tensors(optimizer)}
            self.checkpoints.save(self.clock.progress(self.position).step, tensors, facts)
        self.run.accelerator.wait_for_everyone()

    def write_status(self, state: Literal["running", "done", "preempted", "failed"], reason: str = "") -> None:
        if self.run.directory is not None:
            self.run.directory.status(state, step=self.position // self.clock.global_batch, reason=reason)

    def _keepalive(self) -> None:
        self.interruption.keepalive()
        if self.run.directory is not None:
            self.run.directory.heartbeat(step=self.position // self.clock.global_batch)


def _read_groups(run: Run, *, labelled: bool) -> tuple[dict[str, ViewGroup], dict[str, MaskRule]]:
    """The groups of views that the method reads of the labelled or of the other images, and their masks."""
    needs = [needed for needed in run.method.needs if needed.labelled == labelled and needed.name in run.augment]
    groups = {needed.name: run.augment[needed.name] for needed in needs}
    return groups, {needed.name: needed.mask for needed in needs if needed.mask is not None}


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)

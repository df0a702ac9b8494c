"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

The whole state of a run is the method's and the optimizer's tensors and one number, the position in the endless stream
of samples. The step, the epoch and every schedule follow from it; randomness is seeded anew in each step. So a run that
is killed at any moment goes on bit for bit from its newest checkpoint.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.checkpoint import Checkpoints, optimizer_tensors
from ssl_pipeline.config import ConfigError, RunError
from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.labelled import open_labelled_stream, with_labelled
from ssl_pipeline.data.stream import CropBatch, DataConfig, open_stream
from ssl_pipeline.data.workers import worker_death
from ssl_pipeline.distributed import (
    copy_from_first_rank,
    gather,
    max_over_ranks,
    mean_over_ranks,
    peer_failure,
    rank,
    world_size,
)
from ssl_pipeline.interruption import Interruption, Watched
from ssl_pipeline.launch import seed_everything
from ssl_pipeline.methods.base import StepOutput
from ssl_pipeline.optim import build_optimizer, prepare_gradients, write_values
from ssl_pipeline.resume import changed_settings, load_newest, optimizer_identity
from ssl_pipeline.run_directory import RunDirectory, read_status
from ssl_pipeline.schedule import Progress, steps_in
from ssl_pipeline.sync_batch_norm import synchronize_batch_norm
from ssl_pipeline.tracking import Tracker
from ssl_pipeline.training import Clock, Run, start_clock


def train(run: Run) -> int:
    """Train to the end, from the newest checkpoint if there is one; returns the signal that cut it short, or 0."""
    clock = start_clock(run.index, run.data, run.config)
    method, device = run.method, run.accelerator.device
    if run.config.sync_batch_norm:
        synchronize_batch_norm(method, device)
    method.to(device)
    optimizer = build_optimizer(method, run.optim)
    checkpoints = Checkpoints(run.output / "checkpoints", keep=run.config.keep_checkpoints, report=_say)
    identity = {**run.identity, **optimizer_identity(method, optimizer)}
    saved = load_newest(checkpoints, method, optimizer, run.identity)
    position = saved.position if saved is not None else 0
    if run.directory is not None:
        _write_settings(run.directory, run.settings, complete=position >= clock.end)
    if run.config.compile:
        for module in method.modules():
            if isinstance(module, Backbone):
                module.compile()
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
    with Interruption(hang_timeout=run.config.hang_timeout) as interruption:
        loop = _Loop(run, clock, checkpoints, tracker, network, optimizer, interruption, identity)
        try:
            return loop.go(position)
        except BaseException as error:
            error = (isinstance(error, Exception) and (worker_death(error) or peer_failure(error))) or error
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
        clock: Clock,
        checkpoints: Checkpoints,
        tracker: Tracker,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        interruption: Interruption,
        identity: Mapping[str, str],
    ) -> None:
        self.run, self.clock, self.checkpoints, self.tracker = run, clock, checkpoints, tracker
        self.network, self.optimizer = network, optimizer
        self.interruption, self.identity = interruption, identity
        self.device = run.accelerator.device
        self.lr = run.optim.effective_lr(clock.global_batch)
        self.position = 0
        self.bad_samples = BadSampleLog(
            run.output / "bad_samples.jsonl", budget=run.data.bad_sample_budget, total=len(run.index)
        )

    def go(self, position: int) -> int:
        """Step until the end of the run or until a signal; returns the signal."""
        self.position = position
        stream = self._open_stream(position)
        if position >= self.clock.end:
            self.tracker.message("The run is complete already; nothing is left to train.")
            status = read_status(self.run.output)
            if status is None or status.state != "done":  # cut off between the last checkpoint and this word
                self.write_status("done")
            return 0
        self.write_status("running")
        self._start_interval()
        while self.position < self.clock.end:
            progress = self.clock.progress(self.position)
            outputs, indices = self._accumulate(stream, progress)
            signal_number = self._step(outputs, indices, progress, self.interruption.requested())
            self.position += self.clock.global_batch
            done = self.clock.progress(self.position)
            if signal_number and not self._is_last():
                self._save(done)  # before the monitors, which may outlast the time that a preempted run is given
                self.write_status("preempted", f"signal {signal_number}")
                self._report(outputs, progress)
                self.tracker.message(f"Stopped by signal {signal_number} after step {done.step}; run again to go on.")
                return signal_number
            self._report(outputs, progress)
            if self._is_last() or self._due(self.run.config.save_every, done):
                self._save(done)
        self.write_status("done")
        return 0

    def _open_stream(self, position: int) -> Iterator[CropBatch]:
        """The micro-batches from a position to the end of the run, each with its labelled one if there is any."""
        run, method = self.run, self.run.method
        read = {*method.view_groups, *method.optional_view_groups}
        stream = open_stream(
            run.index,
            {name: group for name, group in run.augment.items() if name in read},
            run.data,
            seed=run.seed,
            position=position,
            rank=rank(),
            world_size=world_size(),
            batches=math.ceil((self.clock.end - position) / self.clock.global_batch) * run.config.accumulate,
        )
        if run.labelled_index is None:
            return stream
        labelled = open_labelled_stream(
            run.labelled_index,
            {name: run.augment[name] for name in method.labelled_view_groups},
            run.data,
            seed=run.seed,
            step=position // self.clock.global_batch,
            rank=rank(),
            world_size=world_size(),
            accumulate=run.config.accumulate,
        )
        return with_labelled(stream, labelled)

    def _accumulate(self, stream: Iterator[CropBatch], progress: Progress) -> tuple[list[StepOutput], Tensor]:
        """Forward and backward over the micro-batches of one step; the gradients are those of their mean loss."""
        outputs, indices = [], []
        for micro in range(self.run.config.accumulate):
            started = time.perf_counter()
            crops = next(stream)
            self.waited += time.perf_counter() - started
            self.bad_samples.record(crops.bad)
            batch = make_batch(crops.to(self.device, non_blocking=True), self.run.augment, self.run.data)
            seed_everything(self.run.seed, progress.step, rank(), micro)
            last = micro == self.run.config.accumulate - 1
            with nullcontext() if last else self.run.accelerator.no_sync(self.network):
                output: StepOutput = self.network(batch, progress)
                self.run.accelerator.backward(output.loss / self.run.config.accumulate)
            outputs.append(StepOutput(output.loss.detach(), output.metrics, output.carry))
            indices.append(batch.index)
            self._sign_of_life()
        return outputs, torch.cat(indices)

    def _step(self, outputs: list[StepOutput], indices: Tensor, progress: Progress, signal_number: int) -> int:
        """One optimizer step, unless a loss or gradient is not finite; returns the signal that any rank received."""
        self.learning_rate = write_values(self.optimizer, self.run.optim, self.lr, progress)
        if self.run.accelerator.scaler is not None:
            self.optimizer.scaler.unscale_(self.optimizer.optimizer)  # type: ignore[attr-defined]
        loss = torch.stack([output.loss for output in outputs]).mean()
        self.gradient_norm = prepare_gradients(self.optimizer, self.run.optim, progress)
        watched = loss if self.run.accelerator.scaler is not None else loss + self.gradient_norm
        flags = torch.stack([(~watched.isfinite()).float(), watched.new_tensor(float(signal_number))])
        broken, signal_number = (int(flag) for flag in max_over_ranks(flags).tolist())
        if broken:
            self._refuse(loss, indices, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.run.method.after_step([output.carry for output in outputs], progress)
        return signal_number

    def _refuse(self, loss: Tensor, indices: Tensor, progress: Progress) -> None:
        """Stop on all ranks, naming the step and the images of the first rank whose loss is not finite.

        Where all losses are finite the gradients are to blame, and these are averages over all ranks.
        """
        loss_W = gather(loss[None])
        broken_rank = int((~loss_W.isfinite()).int().argmax())
        images = gather(indices[None])[broken_rank].tolist()
        names = "; ".join(self.run.index.read(image).location for image in images[:4])
        more = f"; and {len(images) - 4} more" if len(images) > 4 else ""
        raise RunError(
            f"Step {progress.step + 1} was not made: on rank {broken_rank} the loss is {loss_W[broken_rank].item():g}, "
            f"and the gradient norm is {self.gradient_norm.item():g}. Images of its batch: {names}{more}. "
            "The checkpoints are untouched; try a lower optim.lr, a longer warm-up, optim.clip_norm, or another "
            "train.precision."
        )

    def _report(self, outputs: list[StepOutput], progress: Progress) -> None:
        """Log this step's row if it is due, with the monitors' results."""
        done = self.clock.progress(self.position)
        monitors = [monitor for monitor in self.run.monitors if self._due(monitor.every, done) or self._is_last()]
        step = progress.step + 1
        self.images += self.clock.global_batch
        if monitors or self._is_last() or step == 1 or step % self.run.config.log_every == 0:
            names = ["loss", *outputs[0].metrics]
            values = [torch.stack([o.loss, *(o.metrics[name].float() for name in names[1:])]) for o in outputs]
            means = mean_over_ranks(torch.stack(values).mean(dim=0)).tolist()
            elapsed = time.perf_counter() - self.started
            row: dict[str, float | int] = {"step": step, "epoch": done.epoch, "position": self.position}
            row |= dict(zip(names, means, strict=True))
            row["learning_rate"] = self.learning_rate
            row["gradient_norm"] = float(self.gradient_norm)
            row["images_per_second"] = self.images / elapsed
            row["data_wait"] = self.waited / elapsed
            if monitors:  # plain batch norm has statistics of its own on each rank; saved are those of rank 0
                copy_from_first_rank(self.run.method.backbone.buffers())
            for monitor in monitors:
                row |= monitor(Watched(self.run.method.backbone, self._sign_of_life), done)
            self.tracker.log(row)
            self._start_interval()
        self.tracker.advance(step)
        self._sign_of_life()

    def _save(self, done: Progress) -> None:
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
            self.checkpoints.save(done.step, tensors, facts)
        self.run.accelerator.wait_for_everyone()

    def write_status(self, state: Literal["running", "done", "preempted", "failed"], reason: str = "") -> None:
        if self.run.directory is not None:
            self.run.directory.status(state, step=self.position // self.clock.global_batch, reason=reason)

    def _sign_of_life(self) -> None:
        self.interruption.sign_of_life()
        if self.run.directory is not None:
            self.run.directory.heartbeat(step=self.position // self.clock.global_batch)

    def _due(self, every: int | str, done: Progress) -> bool:
        return done.step % max(steps_in(every, done), 1) == 0

    def _is_last(self) -> bool:
        return self.position >= self.clock.end

    def _start_interval(self) -> None:
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0


def make_batch(crops: CropBatch, augment: Mapping[str, ViewGroup], data: DataConfig) -> Batch:
    """The photometric half of augmentation, on the device that the crops are on."""
    labelled = _make_part(crops.labelled, augment, data) if crops.labelled is not None else None
    return replace(_make_part(crops, augment, data), labelled=labelled)


def _make_part(crops: CropBatch, augment: Mapping[str, ViewGroup], data: DataConfig) -> Batch:
    views = {
        name: apply_photometric(images, crops.parameters[name], augment[name], mean=data.mean, std=data.std)
        for name, images in crops.crops.items()
    }
    return Batch(views, crops.labels, crops.index)


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)

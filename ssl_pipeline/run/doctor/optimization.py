"""Rules on the optimization: gradients, learning rate, batch, warm-up, the teacher's momentum, waiting for data."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from ssl_pipeline.run.doctor.case import FEWEST_ROWS, FEWEST_STEPS, Case, Finding, effective_rate, middle, number

EXPLODED = 100.0  # times the median of the rows before
ROWS_BEFORE = 20
FEWEST_BEFORE = 3
FEWEST_OVERFLOWS = 3  # rows in a row
FAR_RATE = 10.0  # times, either way, from the recipe's rate at this batch
FAR_BATCH = 4.0  # times below the batch that the learning rate is meant for
FEWEST_RENEWALS = 2.0  # e^-2: 14 % of the teacher is still the network at random
NO_MOVE = 1e-4  # weights begin at about 0.02 each
TRUST = 1e-3  # of LARS: the share of a layer's norm that a step at a rate of 1 moves it by
WAITING = 0.10  # of the time: the loader is the bottleneck


def gradients_explode(case: Case) -> Finding | None:
    """A gradient norm far above those of the rows before."""
    column = case.column("gradient_norm")
    for place in range(FEWEST_BEFORE, len(column)):
        before = median(value for _, value in column[max(0, place - ROWS_BEFORE) : place])
        step, norm = column[place]
        if norm > EXPLODED * before > 0:
            times = f"{norm / before:.0f} times the median of the rows before"
            seen = f"the gradient norm is {norm:.3g}, {times} ({before:.3g})."
            helps = "Try a lower optim.lr, a longer optim.lr.warmup, or optim.clip_norm."
            return Finding("gradients_explode", step, seen, helps, ("optim.lr", "optim.lr.warmup", "optim.clip_norm"))
    return None


def fp16_overflows(case: Case) -> Finding | None:
    """Several rows in a row whose gradients overflowed, so that their steps were left out."""
    streak: list[int] = []
    for row in case.rows:
        if "gradient_norm" in row and number(row["gradient_norm"]) is None:
            streak.append(int(str(row["step"])))
        else:
            streak = []
        if len(streak) >= FEWEST_OVERFLOWS and streak[-1] - streak[0] >= FEWEST_STEPS:
            seen = f"gradients overflowed in each logged step up to {streak[-1]}, and their steps were left out."
            helps = "Try train.precision=bf16 (or no), a lower optim.lr, or optim.clip_norm."
            return Finding("fp16_overflows", streak[0], seen, helps, ("train.precision", "optim.lr", "optim.clip_norm"))
    return None


def rate_is_zero(case: Case) -> Finding | None:
    """A learning rate that never is more than 0, or so little that the weights stay where they are."""
    column = case.column("learning_rate")
    if len(column) < FEWEST_ROWS or column[-1][0] <= case.grace:
        return None
    rate = max(value for _, value in column)
    moved = _farthest(case, rate)
    if moved is None or moved >= NO_MOVE:
        return None
    seen = "the learning rate is 0"
    if rate:
        seen = f"the learning rate is {rate:.2g} at most, which moves weights by less than {moved:.1g} in the whole run"
    helps = "Set optim.lr.value, and check that warm-up and decay do not make it 0."
    return Finding("rate_is_zero", column[0][0], f"{seen}: nothing is learnt.", helps, ("optim.lr",))


def _farthest(case: Case, rate: float) -> float | None:
    """How far this rate can move a weight in the whole run (AdamW), all of them together (SGD), or these as a share of
    what they are (LARS), decay aside; None where that is not known.
    """
    steps, momentum = case.progress.total_steps, number(case.setting("optim.momentum")) or 0.0
    name, norms = case.setting("optim.name"), case.column("gradient_norm")
    if not rate:
        return 0.0
    if name == "adamw":
        return rate * steps
    if name == "lars":
        return TRUST * rate * steps / (1 - momentum)
    return rate * steps * middle(norms) / (1 - momentum) if norms else None


def rate_far_from_recipe(case: Case) -> Finding | None:
    """A peak of the learning rate that is far from the recipe's at this batch, with the same optimizer."""
    ours, theirs = (case.setting("optim"), case.recipe.get("optim") if case.recipe else None)
    if not isinstance(ours, dict) or not isinstance(theirs, dict) or ours.get("name") != theirs.get("name"):
        return None
    rate, reference = (effective_rate(optim, case.global_batch) for optim in (ours, theirs))
    if not rate or not reference or 1 / FAR_RATE <= rate / reference <= FAR_RATE:
        return None
    times = f"{rate / reference:.3g} times" if rate > reference else f"1/{reference / rate:.3g} of"
    seen = (
        f"the effective learning rate {rate:.3g} is {times} the recipe's at a global batch of "
        f"{case.global_batch} ({reference:.3g})."
    )
    helps = "Try the recipe's optim.lr with its optim.lr_reference_batch, which scales it with the batch."
    return Finding("rate_far_from_recipe", 0, seen, helps, ("optim.lr", "optim.lr_reference_batch"))


def batch_far_below_reference(case: Case) -> Finding | None:
    """A global batch far below the one that the learning rate is stated for."""
    reference = number(case.setting("optim.lr_reference_batch"))
    if reference is None or case.global_batch * FAR_BATCH >= reference:
        return None
    seen = f"the global batch is {case.global_batch} images; the recipe states its learning rate for {reference:.0f}."
    helps = (
        "Raise data.batch_size, use more processes, or train.accumulate (contrastive losses see only a micro-batch)."
    )
    return Finding("batch_far_below_reference", 0, seen, helps, ("data.batch_size", "train.accumulate"))


def run_ends_in_warmup(case: Case) -> Finding | None:
    """A warm-up of the learning rate that takes the whole run."""
    rate, progress = case.schedule("optim.lr"), case.progress
    if rate is None:
        return None
    length = rate.delay.steps(progress) + rate.warmup.steps(progress)
    if length < progress.total_steps:
        return None
    seen = f"the learning rate warms up for {length} steps, and the run ends after {progress.total_steps}."
    helps = "Shorten optim.lr.warmup (a share such as 5% fits any length), or train for longer."
    return Finding("run_ends_in_warmup", 0, seen, helps, ("optim.lr.warmup", "train.epochs"))


def teacher_too_slow(case: Case) -> Finding | None:
    """A teacher that still is the network at random when the run ends: the sum of 1 - momentum over all steps."""
    momentum, progress = case.schedule("method.teacher_momentum"), case.progress
    if momentum is None:
        return None
    every = max(1, progress.total_steps // 1000)
    places = range(0, progress.total_steps, every)
    renewals = every * sum(1 - momentum(replace(progress, step=step)) for step in places)
    if renewals >= FEWEST_RENEWALS:
        return None
    seen = (
        f"with a momentum from {momentum(replace(progress, step=0)):g} on, {progress.total_steps} steps renew the "
        f"teacher {max(renewals, 0):.1f} times: it hardly changes."
    )
    suits = math.floor(1000 * (1 - 2 * FEWEST_RENEWALS / progress.total_steps)) / 1000
    helps = "Train for longer."
    if suits > 0:
        helps = f"Lower method.teacher_momentum (to {suits:g} or below for a run of this length), or train for longer."
    return Finding("teacher_too_slow", 0, seen, helps, ("method.teacher_momentum", "train.epochs"))


def waits_for_data(case: Case) -> Finding | None:
    """Images that come too slowly; the run says it while it trains, with what helps on its machine."""
    column = case.column("data_wait")[1:]  # in the first interval the workers start
    newest = column[-max(FEWEST_ROWS, len(column) // 4) :]
    if len(newest) < FEWEST_ROWS or middle(newest) <= WAITING:
        return None
    seen = f"{middle(newest):.0%} of the time of a step was spent waiting for images."
    helps = "Try more data.workers, data.crop_on=device, data.cache=true, or shards packed with short_side=320."
    return Finding("waits_for_data", newest[0][0], seen, helps, ("data.workers", "data.crop_on", "data.cache"))

"""What a recipe allows but probably does not mean, now that the length of the run is known: a line each at the
start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones.networks import TokenBackbone, batch_norms
from ssl_pipeline.config import Config
from ssl_pipeline.config.ranges import plain
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.schedule import Duration, Progress, Schedule
from ssl_pipeline.training.clock import Clock


def remarks(method: Config, optim: OptimConfig, augment: Mapping[str, ViewGroup], clock: Clock) -> list[str]:
    """One sentence for each: durations beyond the end of the run, a learning rate that starts or ends above its peak,
    local crops larger than the global ones.
    """
    progress = clock.progress(0)
    sections: tuple[tuple[str, Config], ...] = (("method", method), ("optim", optim))
    return [
        *(said for name, section in sections for said in _beyond_the_end(name, section, progress)),
        *_rates_above_the_peak(optim, clock.global_batch),
        *_large_local_crops(augment),
    ]


def about_accumulation(method: Method, *, accumulate: int, micro_batch: int) -> str | None:
    """What of the global batch a loss does not see where it is accumulated; None where it sees all of it.

    micro_batch: images of one micro-batch over all processes.
    """
    ties = [method.coupled_by] if method.coupled_by else []
    if any(part.training and any(p.requires_grad for p in part.parameters()) for part in batch_norms(method)):
        ties.append("batch norm")
    if accumulate == 1 or not ties:
        return None
    return (
        f"train.accumulate={accumulate}: {' and '.join(ties)} of {type(method).__name__} are those of a micro-batch of "
        f"{micro_batch} images, not of the global batch of {micro_batch * accumulate}."
    )


def about_batch_norm(method: Method, *, shared: bool, num_processes: int, batch_size: int) -> str | None:
    """What of the global batch batch norm does not see on several processes; None where there is nothing to say.

    shared: train.sync_batch_norm. batch_size: images per process and micro-batch.
    """
    if shared or num_processes == 1 or not any(part.training for part in batch_norms(method)):
        return None
    return (
        f"train.sync_batch_norm=false: batch norm of {type(method).__name__} takes its statistics from the "
        f"{batch_size} images of each process alone, so {num_processes} processes train a little differently from one. "
        "true shares them."
    )


def about_class_token(method: Method) -> str | None:
    """A warning if the evaluated features are a class token that the loss never reads; None otherwise."""
    backbone = method.backbone
    if method.reads_class_token or not isinstance(backbone, TokenBackbone) or not backbone.takes_class_token_alone:
        return None
    own = type(method).__name__
    return (
        f"the loss of {own} is that of the patches, and the features of '{backbone.name}' are its class token: they "
        "say little. backbone.arguments.global_pool=avg takes the mean of the patches, for a ViT with "
        "backbone.arguments.fc_norm=false."
    )


def about_soft_labels(method: Method, labelled: ShardIndex) -> str | None:
    """What is not learnt of soft labels; None of hard ones, and where all of it is."""
    if not method.hardens_labels or labelled.num_soft_classes is None:
        return None
    return (
        f"The labels of {labelled.called} are soft, and {type(method).__name__} with these settings learns the "
        "likeliest class of each alone."
    )


def _beyond_the_end(name: str, section: Config, progress: Progress) -> Iterator[str]:
    for field in type(section).model_fields:
        key, value = f"{name}.{field}", getattr(section, field)
        if isinstance(value, Schedule):
            yield from _schedule_beyond_the_end(key, value, progress)
        elif isinstance(value, Duration) and value.steps(progress) >= progress.total_steps:
            yield f"{_too_long(key, value, progress)}."


def _schedule_beyond_the_end(key: str, schedule: Schedule, progress: Progress) -> Iterator[str]:
    before = schedule.delay.steps(progress)
    reached = before + schedule.warmup.steps(progress) - schedule.inclusive
    if reached >= progress.total_steps:
        part, duration = ("delay", schedule.delay) if schedule.warmup.is_zero else ("warmup", schedule.warmup)
        yield f"{_too_long(f'{key}.{part}', duration, progress)}: {plain(schedule.value)} is never reached."
        return
    for milestone in schedule.milestones:
        if before + milestone.steps(progress) >= progress.total_steps:
            yield f"{_too_long(f'{key}.milestones', milestone, progress)}."
    if schedule.decay_for is not None:
        end = before + (schedule.warmup.steps(progress) + schedule.decay_for.steps(progress))
        if end > progress.total_steps:
            yield (
                f"{key}.decay_for={schedule.decay_for} ends at step {end}, but the run ends after "
                f"{progress.total_steps}: its last value is never reached."
            )


def _too_long(key: str, duration: Duration, progress: Progress) -> str:
    steps, total = duration.steps(progress), progress.total_steps
    return f"{key}={duration} is {steps} steps, but the run ends after {total}"


def _rates_above_the_peak(optim: OptimConfig, global_batch: int) -> Iterator[str]:
    lr = optim.effective_lr(global_batch)
    for key, number in lr.numbers().items():
        if key in ("start", "final") and number > lr.value:
            yield (
                f"optim.lr.{key}={plain(number)} is above the effective learning rate {lr.value:g} "
                f"that the {'warm-up leads to' if key == 'start' else 'decay comes from'}."
            )


def _large_local_crops(augment: Mapping[str, ViewGroup]) -> Iterator[str]:
    if not {"global", "local"} <= augment.keys():
        return
    local, other = max(augment["local"].sizes), max(augment["global"].sizes)
    if local > other:
        yield f"augment.local.size={local} is larger than augment.global.size={other}: local crops are the small ones."

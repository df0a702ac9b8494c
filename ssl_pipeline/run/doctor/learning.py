"""Rules on what is learnt: losses of mere guessing, collapse of targets and features, k-NN against the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ssl_pipeline.run.doctor.case import Case, Finding, Point, middle, number

GUESSING = 0.003  # below what guessing costs; a slow start of 1 % is progress already
NEAR = 0.01  # of the largest entropy, to either end
FEW_ROWS = 5  # that falls are measured against
COLLAPSED_STD = 0.005  # of features; 1 is evenly spread
FALLEN_STD = 0.1  # of the highest of the first values
FALLEN_RANK = 0.5  # of the highest
KNN_POINTS = 3.0  # percent; the standard error of 360 images is 1.2
COUNTED_TARGETS = 64  # of losses.prototypes_used
POINT = 1.0  # percent below the start that is reported

WEAK_START = "Try a lower optim.lr, a longer optim.lr.warmup, and the recipe's own batch and augmentation."
CENTRING = (
    "Try a lower method.teacher_temperature, a lower optim.lr, and a centre that follows (method.centre_momentum)."
)
FALL_HELPS = "Try a lower optim.lr, a backbone that stays frozen for longer, or other (weaker) augmentation."


def loss_stuck_at_guessing(case: Case) -> Finding | None:
    """A contrastive loss at ln(number of candidates), a prototype loss at ln K, or above: what guessing costs."""
    for name, guess, formula, keys in _losses_of_guessing(case):
        streak = case.lasting(name, at_least((1 - GUESSING) * guess)) if guess > 0 else []
        if streak:
            seen = f"{name} is {middle(streak):.3g} since then, and {formula} = {guess:.3g} is what guessing costs."
            return Finding("loss_stuck_at_guessing", streak[0][0], seen, WEAK_START, keys)
    return None


def _losses_of_guessing(case: Case) -> Iterator[tuple[str, float, str, tuple[str, ...]]]:
    """The losses of a method with what they are when all candidates are alike."""
    method, batch = case.method, case.micro_batch
    keys = ("optim.lr", "optim.lr.warmup", "data.batch_size")
    temperature, queue = (number(case.setting(f"method.{name}")) for name in ("temperature", "queue_size"))
    if method == "simclr":
        scale = number(case.setting("method.loss_scale")) or 1.0
        formula = "ln(2N - 1)" if scale == 1.0 else f"{scale:g} * ln(2N - 1)"
        yield "loss", scale * math.log(2 * batch - 1), f"{formula} with N = {batch} images", keys
    elif method == "nnclr":
        yield "loss", math.log(batch), f"ln N with N = {batch} images", keys
    elif method == "moco" and queue is not None:
        yield "loss", math.log(1 + queue), f"ln(1 + {queue:.0f} keys)", keys
    elif method == "moco_v3" and temperature is not None:
        yield "loss", 4 * temperature * math.log(batch), f"4 * temperature * ln N with N = {batch} images", keys
    prototypes = number(case.setting("method.num_prototypes"))
    if prototypes is not None:
        name = "class_loss" if case.column("class_loss") else "loss"
        yield name, math.log(prototypes), f"ln K with K = {prototypes:.0f} prototypes", keys


def teacher_is_uniform(case: Case) -> Finding | None:
    """Targets with the entropy of all prototypes alike, ln K."""
    for name, largest in _entropies(case):
        streak = case.lasting(name, at_least((1 - NEAR) * largest))
        if streak:
            seen = (
                f"{name} is {middle(streak):.3g} since then, as of targets in which all prototypes are alike (ln K = "
            )
            keys = ("method.teacher_temperature", "method.centre_momentum", "optim.lr")
            return Finding(
                "teacher_is_uniform", streak[0][0], f"{seen}{largest:.3g}): they say nothing.", CENTRING, keys
            )
    return None


def teacher_is_one_hot(case: Case) -> Finding | None:
    """Targets without entropy."""
    for name, largest in _entropies(case):
        streak = case.lasting(name, at_most(NEAR * largest))
        if streak:
            seen = f"{name} is {middle(streak):.2g} since then: each target is a single prototype, without any doubt."
            helps = "Try a higher method.teacher_temperature (or epsilon), a lower optim.lr, and a centre that follows."
            keys = ("method.teacher_temperature", "method.epsilon", "method.centre_momentum", "optim.lr")
            return Finding("teacher_is_one_hot", streak[0][0], seen, helps, keys)
    return None


def _entropies(case: Case) -> Iterator[tuple[str, float]]:
    """The entropies of targets that are logged, with the largest possible."""
    prototypes = number(case.setting("method.num_prototypes"))
    if prototypes is not None:
        of_patches = number(case.setting("method.num_patch_prototypes")) or prototypes
        yield from (("target_entropy", math.log(prototypes)), ("patch_target_entropy", math.log(of_patches)))


def prototypes_are_dead(case: Case) -> Finding | None:
    """One prototype, whatever the image."""
    prototypes = number(case.setting("method.num_prototypes"))
    if prototypes is None:
        return None
    counted = min(COUNTED_TARGETS, prototypes, number(case.setting("data.batch_size")) or 1.0)
    streak = case.lasting("prototypes_used", at_most(1.5 / counted))
    if not streak:
        return None
    seen = f"prototypes_used is {middle(streak):.2g} since then: all images share one prototype, the others are dead."
    keys = ("method.centre_momentum", "method.teacher_temperature", "method.freeze_prototypes_for", "optim.lr")
    helps = f"{CENTRING} Prototypes that stay frozen for longer (method.freeze_prototypes_for) help too."
    return Finding("prototypes_are_dead", streak[0][0], seen, helps, keys)


def features_collapse(case: Case) -> Finding | None:
    """All images have nearly the same features."""
    first = case.column("feature_std")[:FEW_ROWS]
    if not first:
        return None
    highest = max(value for _, value in first)
    limit = max(COLLAPSED_STD, FALLEN_STD * highest)
    streak = case.lasting("feature_std", at_most(limit))
    if not streak:
        return None
    seen = f"feature_std fell from {highest:.2g} to {streak[-1][1]:.2g}: all images get nearly the same features."
    keys = ("optim.lr", "optim.weight_decay", "method")
    return Finding("features_collapse", streak[0][0], seen, f"{WEAK_START} Check the method's own weights.", keys)


def rank_falls(case: Case) -> Finding | None:
    """RankMe well below what it was, twice in a row."""
    fall = _fall(case.column("rankme"), lambda now, best: now <= FALLEN_RANK * best)
    if fall is None:
        return None
    (best_step, best), (step, now) = fall
    seen = f"RankMe fell from {best:.3g} at step {best_step} to {now:.3g}: the features use fewer and fewer dimensions."
    helps = "Try a lower optim.lr, a higher optim.weight_decay, or the checkpoint of that time."
    return Finding("rank_falls", step, seen, helps, ("optim.lr", "optim.weight_decay", "train.keep_checkpoints"))


def knn_falls_with_the_loss(case: Case) -> Finding | None:
    """The loss becomes better and the features worse."""
    fall = _fall(case.column("knn_top1"), lambda now, best: now <= best - KNN_POINTS)
    losses = case.column("loss")
    if fall is None or not losses:
        return None
    (best_step, best), (step, now) = fall
    then, later = (middle(_around(losses, at)) for at in (best_step, losses[-1][0]))
    if later >= then:
        return None
    seen = (
        f"k-NN top-1 fell from {best:.1f} % at step {best_step} to {now:.1f} %, while the loss fell from {then:.3g} to "
        f"{later:.3g}."
    )
    helps = (
        "The method's task can be solved without better features: try stronger augment settings, a lower "
        "optim.lr, a shorter run, or the checkpoint of that time."
    )
    return Finding("knn_falls_with_the_loss", step, seen, helps, ("augment", "optim.lr", "train.epochs"))


def below_the_start(case: Case) -> Finding | None:
    """Figures before the first step that the newest ones do not reach; monitors say it while the run trains."""
    for metric, name in (("knn_top1", "k-NN top-1"), ("rankme_percent", "RankMe (percent)")):
        start, column = number(case.start.get(metric)), case.column(metric)
        if start is not None and column and fell_below(start, column[-1][1]):
            step, now = column[-1]
            seen = f"{name} fell from {start:.1f} at the start to {now:.1f}."
            keys = ("optim.lr", "optim.freeze_backbone_for", "optim.backbone_lr_scale", "augment")
            return Finding("below_the_start", step, seen, FALL_HELPS, keys)
    return None


def fell_below(start: float, now: float) -> bool:
    """Whether a figure in percent lies a point or more below that of the start."""
    return start - now >= POINT - 1e-6


def at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def _fall(column: list[Point], fallen: Callable[[float, float], bool]) -> tuple[Point, Point] | None:
    """The best value and the newest, if that and the one before it have fallen from it."""
    if len(column) < 3:
        return None
    best = max(column, key=lambda point: point[1])
    return (best, column[-1]) if all(fallen(value, best[1]) for _, value in column[-2:]) else None


def _around(column: list[Point], step: int) -> list[Point]:
    """The values nearest to a step."""
    return sorted(column, key=lambda point: abs(point[0] - step))[:FEW_ROWS]

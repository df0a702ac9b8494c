"""The doctor: rules over the logged rows and the settings of a run that recognise common problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ssl_pipeline.config import Value
from ssl_pipeline.run.doctor import learning, optimization
from ssl_pipeline.run.doctor.case import Case, Finding, Row

__all__ = ["RULES", "Finding", "diagnose"]

RULES: tuple[Callable[[Case], Finding | None], ...] = (
    learning.loss_stuck_at_guessing,
    learning.teacher_is_uniform,
    learning.teacher_is_one_hot,
    learning.prototypes_are_dead,
    learning.features_collapse,
    learning.rank_falls,
    learning.knn_falls_with_the_loss,
    learning.below_the_start,
    optimization.gradients_explode,
    optimization.fp16_overflows,
    optimization.rate_is_zero,
    optimization.rate_far_from_recipe,
    optimization.batch_far_below_reference,
    optimization.run_ends_in_warmup,
    optimization.teacher_too_slow,
    optimization.waits_for_data,
)
"""Each is named as its findings are."""


def diagnose(
    rows: Sequence[Row], settings: Mapping[str, Value], recipe: Mapping[str, Value] | None = None
) -> list[Finding]:
    """What is wrong with a run, in the order of the steps at which it was seen first; pure.

    rows: those of metrics.jsonl. settings: its config.yaml as a plain tree, and recipe that of the recipe's file, with
    which the learning rate is compared.
    """
    case = Case(rows, settings, recipe)
    if not case.rows:
        return []
    return sorted((finding for rule in RULES if (finding := rule(case))), key=lambda finding: finding.step)

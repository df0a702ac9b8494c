"""Schedules against the official codes' own formulas, written out per step."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from ssl_pipeline.schedule import Progress, Schedule, steps_in

STEPS_PER_EPOCH = 7
EPOCHS = 10
TOTAL = STEPS_PER_EPOCH * EPOCHS


def values(schedule: Schedule, *, total: int = TOTAL, steps_per_epoch: float = STEPS_PER_EPOCH) -> list[float]:
    return [schedule(Progress(step, total, steps_per_epoch)) for step in range(total)]


def test_epoch_counts_with_its_fraction():
    assert Progress(step=21, total_steps=TOTAL, steps_per_epoch=14).epoch == 1.5


# durations


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(0, 0), (1250, 1250), ("0ep", 0), ("3ep", 21), ("0.5ep", 4), ("10%", 7), ("100%", 70), ("2.5%", 2), (".5ep", 4)],
)
def test_durations_are_steps_epochs_or_shares_of_the_run(duration, steps):
    assert steps_in(duration, Progress(0, TOTAL, STEPS_PER_EPOCH)) == steps


def test_epochs_need_not_be_whole_steps():
    assert steps_in("10ep", Progress(0, 1000, 19.53125)) == 195


@pytest.mark.parametrize(
    "duration", [-1, "", "ep", "%", "10", "ten", "-1ep", "1e3ep", "5%ep", "5ep%", ".ep", "²ep", " 5ep"]
)
def test_other_durations_are_refused(duration):
    with pytest.raises(ValidationError, match="a duration"):
        Schedule(value=1.0, warmup=duration)


# the formulas of the official codes


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_dino_is_linspace_and_then_a_cosine_over_what_is_left(warmup_epochs):
    value, final = 5e-4, 1e-6
    warmup_steps = warmup_epochs * STEPS_PER_EPOCH
    warm = np.linspace(0.0, value, warmup_steps)
    iterations = np.arange(TOTAL - warmup_steps)
    cosine = np.array(
        [final + 0.5 * (value - final) * (1 + math.cos(math.pi * i / len(iterations))) for i in iterations]
    )
    schedule = Schedule(value=value, final=final, warmup=f"{warmup_epochs}ep", inclusive=True)
    np.testing.assert_allclose(values(schedule), np.concatenate([warm, cosine]), rtol=1e-12, atol=1e-18)


def test_dino_teacher_momentum_and_weight_decay_rise_on_a_cosine():
    for value, final in ((0.996, 1.0), (0.04, 0.4)):
        steps = np.arange(TOTAL)
        expected = final - (final - value) * (np.cos(np.pi * steps / TOTAL) + 1) / 2
        np.testing.assert_allclose(values(Schedule(value=value, final=final)), expected, rtol=1e-12)


def test_dino_teacher_temperature_is_one_entry_per_epoch():
    expected = np.concatenate([np.linspace(0.04, 0.07, 3), np.full(EPOCHS - 3, 0.07)]).repeat(STEPS_PER_EPOCH)
    schedule = Schedule(value=0.07, start=0.04, warmup="3ep", inclusive=True, every="epoch")
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12)


def test_mae_and_moco_v3_are_a_half_cycle_of_the_fractional_epoch():
    lr, minimum, warmup_epochs = 1.5e-4, 1e-6, 2
    expected = []
    for step in range(TOTAL):
        epoch = step / STEPS_PER_EPOCH
        if epoch < warmup_epochs:
            expected.append(lr * epoch / warmup_epochs)
        else:
            share = (epoch - warmup_epochs) / (EPOCHS - warmup_epochs)
            expected.append(minimum + (lr - minimum) * 0.5 * (1.0 + math.cos(math.pi * share)))
    np.testing.assert_allclose(values(Schedule(value=lr, final=minimum, warmup="2ep")), expected, rtol=1e-12)


def test_fixmatch_is_seven_sixteenths_of_pi():
    expected = [0.03 * math.cos(7 * math.pi * step / (16 * TOTAL)) for step in range(TOTAL)]
    np.testing.assert_allclose(values(Schedule(value=0.03, decay="cosine_7_16")), expected, rtol=1e-12)


def test_lightly_steps_its_cosine_once_per_epoch():
    expected = [0.06 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]
    schedule = Schedule(value=0.06, final=0.0, every="epoch")
    np.testing.assert_allclose(values(schedule), np.repeat(expected, STEPS_PER_EPOCH), rtol=1e-12)


def test_swav_warms_up_from_its_start():
    warm = np.linspace(0.3, 4.8, 10 * 2)
    schedule = Schedule(value=4.8, final=0.0048, start=0.3, warmup=20, inclusive=True)
    np.testing.assert_allclose(values(schedule)[:20], warm, rtol=1e-12)


def test_linear_is_a_straight_line():
    expected = np.linspace(1.0, 0.0, TOTAL + 1)[:-1]
    np.testing.assert_allclose(values(Schedule(value=1.0, final=0.0, decay="linear")), expected, atol=1e-15)


# edges


def test_without_final_the_value_stays():
    assert set(values(Schedule(value=0.3))) == {0.3}
    assert values(Schedule(value=1.0, warmup=2))[:4] == [0.0, 0.5, 1.0, 1.0]


def test_a_warmup_of_one_step_is_the_start():
    assert values(Schedule(value=1.0, warmup=1))[:2] == [0.0, 1.0]
    assert values(Schedule(value=1.0, warmup=1, inclusive=True))[:2] == [0.0, 1.0]


def test_a_warmup_longer_than_the_run_is_cut_off():
    assert values(Schedule(value=1.0, final=0.0, warmup=100), total=4) == [0.0, 0.01, 0.02, 0.03]
    assert values(Schedule(value=1.0, final=0.0, warmup="100%"), total=4) == [0.0, 0.25, 0.5, 0.75]


def test_a_run_of_one_step_has_the_value():
    assert values(Schedule(value=0.5, final=0.0), total=1) == [0.5]
    assert values(Schedule(value=0.5, final=0.0, every="epoch"), total=1) == [0.5]


def test_after_the_end_the_final_value_stays():
    schedule = Schedule(value=1.0, final=0.25, warmup=5)
    assert schedule(Progress(TOTAL, TOTAL, STEPS_PER_EPOCH)) == 0.25
    assert schedule(Progress(TOTAL + 3, TOTAL, STEPS_PER_EPOCH)) == 0.25


@pytest.mark.parametrize("steps_per_epoch", [0.1, 1 / 3, 19.53125, 0.7])
def test_epoch_wise_values_change_with_the_epoch_whatever_its_length(steps_per_epoch):
    schedule = Schedule(value=1.0, final=0.0, every="epoch")
    for step in range(50):
        epoch = math.floor(step / steps_per_epoch + 1e-9)
        epochs = round(50 / steps_per_epoch)
        expected = (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2
        assert schedule(Progress(step, 50, steps_per_epoch)) == pytest.approx(expected, abs=1e-12)


def test_scaling_multiplies_the_value_alone():
    schedule = Schedule(value=0.5, final=1e-6, start=1e-4, warmup="3ep")
    scaled = schedule.times(4.0)
    assert (scaled.value, scaled.final, scaled.start, scaled.warmup) == (2.0, 1e-6, 1e-4, "3ep")
    assert schedule.value == 0.5


def test_inclusive_without_warmup_is_refused():
    with pytest.raises(ValidationError, match="inclusive speaks of the last warm-up step, but warmup is 0"):
        Schedule(value=1.0, inclusive=True)

"""Schedules against the official codes' own formulas, written out per step."""

import bisect
import copy
import math

import numpy as np
import pytest
from pydantic import ValidationError

from ssl_pipeline.config import Config, dump, validate
from ssl_pipeline.schedule import Duration, Progress, Schedule

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
    assert Duration(duration).steps(Progress(0, TOTAL, STEPS_PER_EPOCH)) == steps


def test_epochs_need_not_be_whole_steps():
    assert Duration("10ep").steps(Progress(0, 1000, 19.53125)) == 195


@pytest.mark.parametrize(
    "duration", [-1, "", "ep", "%", "10", "ten", "-1ep", "1e3ep", "5%ep", "5ep%", ".ep", "²ep", " 5ep"]
)
def test_other_durations_are_refused(duration):
    with pytest.raises(ValidationError, match="a duration"):
        Schedule(value=1.0, warmup=duration)
    with pytest.raises(ValueError, match="a duration"):
        Duration(duration)


@pytest.mark.parametrize("duration", [True, 1.5, None, ["1ep"]])
def test_a_setting_of_another_type_is_no_duration(duration):
    with pytest.raises(ValidationError):
        Schedule(value=1.0, warmup=duration)


class Lengths(Config):
    every: Duration = Duration("1ep")
    stop: Duration | None = None
    places: tuple[Duration, ...] = ()


def test_a_duration_is_dumped_as_it_was_written():
    lengths = validate(Lengths, {"every": "07.50ep", "stop": 1250, "places": ["5%", 0]})
    assert lengths.model_dump(mode="json") == {"every": "07.50ep", "stop": 1250, "places": ["5%", 0]}
    assert dump(lengths).splitlines() == ["every: 07.50ep", "stop: 1250", "places: [5%, 0]"]
    assert validate(Lengths, lengths.model_dump(mode="json")) == lengths
    assert dump(Lengths()).splitlines() == ["every: 1ep", "stop: null", "places: []"]


def test_durations_compare_and_hash_as_what_is_written():
    assert Duration("10ep") == Duration("10ep") == "10ep"
    assert Duration(3) == 3
    assert Duration("3ep") != Duration(3)
    assert len({Duration("1ep"), Duration("1ep"), Duration("2ep"), Duration(1)}) == 3
    assert copy.deepcopy(Duration("5%")) == Duration("5%")
    assert str(Duration("5%")) == "5%"
    assert Schedule(value=1.0, warmup=Duration("3ep")) == Schedule(value=1.0, warmup="3ep")


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
    schedule = Schedule(value=value, final=final, warmup=f"{warmup_epochs}ep", inclusive=warmup_epochs > 0)
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


@pytest.mark.parametrize(("warmup", "freeze"), [(0, 0), (14, 0), (14, 5), (0, 5)])
def test_dinov2_freezes_at_zero_then_linspace_then_a_cosine_over_what_is_left(warmup, freeze):
    value, final, start = 2e-3, 1e-6, 1e-5
    iterations = np.arange(TOTAL - warmup - freeze)
    cosine = final + 0.5 * (value - final) * (1 + np.cos(np.pi * iterations / len(iterations)))
    expected = np.concatenate([np.full(freeze, start), np.linspace(start, value, warmup), cosine])
    schedule = Schedule(value=value, final=final, start=start, warmup=warmup, inclusive=warmup > 0, delay=freeze)
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", [0, 14])
@pytest.mark.parametrize("length", [None, 30, 1])
def test_dinov3_is_a_warmup_without_its_end_a_cosine_with_both_and_the_end_from_there_on(warmup, length):
    start, peak, end = 1e-5, 1e-3, 1e-6
    linear = np.linspace(start, peak, warmup, endpoint=False)
    cosine = np.cos(np.linspace(0, np.pi, TOTAL - warmup if length is None else length))
    cosine = (peak - end) * (cosine + 1) / 2 + end
    expected = np.concatenate([linear, cosine, np.full(TOTAL - warmup - len(cosine), end)])
    schedule = Schedule(value=peak, final=end, start=start, warmup=warmup, decay_for=length, reach_final=True)
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12)


def test_ibot_keeps_the_patch_temperature_at_its_start_until_masking_begins():
    expected = [0.04] * 3 + list(np.linspace(0.04, 0.07, 4)) + [0.07] * 3
    schedule = Schedule(value=0.07, start=0.04, delay="3ep", warmup="4ep", inclusive=True, every="epoch")
    np.testing.assert_allclose(values(schedule), np.repeat(expected, STEPS_PER_EPOCH), rtol=1e-12)


def test_adamatch_decays_on_an_arc_to_a_quarter():
    expected = [0.03 * math.cos(math.acos(0.25) * step / TOTAL) for step in range(TOTAL)]
    schedule = Schedule(value=0.03, final=0.0075, decay="cosine_arc")
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12)
    assert schedule(Progress(TOTAL, TOTAL, STEPS_PER_EPOCH)) == pytest.approx(0.0075)


def test_the_arc_with_fixmatchs_end_is_fixmatchs():
    arc = Schedule(value=0.03, final=0.03 * math.cos(7 * math.pi / 16), decay="cosine_arc")
    np.testing.assert_allclose(values(arc), values(Schedule(value=0.03, decay="cosine_7_16")), rtol=1e-12)


def test_adamatchs_weight_rises_on_a_cosine_over_half_of_the_run():
    expected = [0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * step / TOTAL)) for step in range(TOTAL)]
    schedule = Schedule(value=1.0, warmup="50%", rise="cosine")
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12, atol=1e-15)


def test_temporal_ensembling_and_mean_teacher_rise_exponentially():
    expected = [8.0 * math.exp(-5 * (1 - epoch / 4) ** 2) if epoch < 4 else 8.0 for epoch in range(EPOCHS)]
    schedule = Schedule(value=8.0, warmup="4ep", rise="exponential", every="epoch")
    np.testing.assert_allclose(values(schedule), np.repeat(expected, STEPS_PER_EPOCH), rtol=1e-12)
    smooth = values(Schedule(value=2.0, start=1.0, warmup=10, rise="exponential"))
    assert smooth[0] == pytest.approx(1 + math.exp(-5))
    assert smooth[10:] == [2.0] * (TOTAL - 10)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_simmim_and_moco_multiply_at_milestones_counted_from_the_start_of_the_run(every):
    lr, start, warmup, milestones = 8e-4, 5e-7, 7, [21, 49]
    expected = []
    for step in range(TOTAL):
        now = step if every == "step" else step // STEPS_PER_EPOCH * STEPS_PER_EPOCH
        if now < warmup:
            expected.append(start + now * (lr - start) / warmup)
        else:
            expected.append(lr * 0.1 ** bisect.bisect_right(milestones, now))
    settings = {"value": lr, "start": start, "warmup": warmup, "every": every}
    schedule = Schedule(**settings, decay="steps", milestones=["7ep", "30%"], factor=0.1)
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-12)


def test_a_decay_of_its_own_length_keeps_the_way_of_any_decay():
    whole = values(Schedule(value=1.0, final=0.5, decay="linear"), total=20)
    short = values(Schedule(value=1.0, final=0.5, decay="linear", delay=3, warmup=4, decay_for=20, start=1.0))
    assert short[:7] == [1.0] * 7
    np.testing.assert_allclose(short[7:], whole + [0.5] * (TOTAL - 27), rtol=1e-12)


def test_a_decay_of_no_length_is_the_final_value():
    assert values(Schedule(value=1.0, final=0.5, warmup=2, decay_for=0))[:4] == [0.0, 0.5, 0.5, 0.5]


def test_the_last_step_of_a_run_can_have_the_final_value():
    for decay in ("cosine", "linear", "cosine_arc"):
        last = values(Schedule(value=1.0, final=0.25, decay=decay, warmup=5, reach_final=True))[-2:]
        assert last[1] == pytest.approx(0.25, abs=1e-12)
        assert last[0] > 0.25


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


@pytest.mark.parametrize("warmup", [0, "0ep", "0%", "0.0ep"])
def test_inclusive_without_warmup_is_refused(warmup):
    with pytest.raises(ValidationError, match="inclusive applies to the last warm-up step, but warmup is 0"):
        Schedule(value=1.0, warmup=warmup, inclusive=True)


def test_a_delay_without_warmup_holds_the_start():
    assert values(Schedule(value=1.0, start=0.5, delay=3))[:5] == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert values(Schedule(value=1.0, start=0.5, delay=9), total=4) == [0.5] * 4


def test_without_warmup_the_value_is_there_at_once_whatever_the_rise():
    for rise in ("linear", "cosine", "exponential"):
        assert values(Schedule(value=0.3, rise=rise))[0] == 0.3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"decay": "cosine_arc"}, "final must lie between -value and value"),
        ({"decay": "cosine_arc", "final": 1.5}, r"Got final=1\.5 and value=1\."),
        ({"decay": "steps"}, "milestones are missing"),
        ({"decay": "steps", "milestones": [3], "final": 0.0}, "final has no effect with decay=steps"),
        ({"decay": "steps", "milestones": [3], "reach_final": True}, "reach_final has no effect with decay=steps"),
        ({"milestones": [3]}, "milestones belongs to decay=steps"),
        ({"factor": 0.5}, "factor belongs to decay=steps"),
        ({"decay_for": 3}, "decay_for applies to the way to final, but final is not set"),
        ({"reach_final": True}, "reach_final applies to the way to final, but final is not set"),
        ({"milestones": ["soon"], "decay": "steps"}, "a duration is"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Schedule(value=1.0, **settings)


def test_an_arc_that_scaling_makes_impossible_is_refused():
    schedule = Schedule(value=1.0, final=0.25, decay="cosine_arc")
    assert schedule.times(0.5).value == 0.5
    with pytest.raises(ValueError, match="final must lie between"):
        schedule.times(0.1)

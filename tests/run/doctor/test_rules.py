"""Each rule on rows that are made for it: with the disease, and just without."""

import math

import pytest

from ssl_pipeline.run.doctor import RULES, diagnose
from ssl_pipeline.run.doctor.case import Case

BATCH, STEPS = 64, 1000
SETTINGS = {
    "method": {"name": "dino", "num_prototypes": 256, "freeze_prototypes_for": 20},
    "data": {"batch_size": BATCH},
    "optim": {"name": "adamw", "lr": {"value": 1e-3, "warmup": 50}},
    "train": {"steps": STEPS, "accumulate": 1},
}


def with_settings(**changed):
    """The settings with some keys (`optim__lr`) replaced."""
    settings = {section: dict(values) for section, values in SETTINGS.items()}
    for key, value in changed.items():
        section, name = key.split("__")
        settings[section][name] = value
    return settings


def rows_of(num_rows=20, every=50, **columns):
    """Rows every 50 steps; a column is a number, or a function of the row's number."""
    made = []
    for row in range(num_rows):
        step = (row + 1) * every
        values = {name: value(row) if callable(value) else value for name, value in columns.items()}
        made.append({"step": step, "epoch": step / 25, "images": step * BATCH, **values})
    return made


def found(rows, settings=SETTINGS, recipe=None):
    return {finding.rule: finding for finding in diagnose(rows, settings, recipe)}


def test_a_rule_is_named_as_its_findings():
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
    [(name, finding)] = found(rows_of(learning_rate=0.0)).items()
    assert name == finding.rule == "rate_is_zero"


@pytest.mark.parametrize(
    ("optim", "rate", "is_found"),
    [
        ({"optim__name": "adamw"}, 1e-8, True),  # 1,000 steps: 1e-5
        ({"optim__name": "adamw"}, 1e-6, False),
        ({"optim__name": "sgd", "optim__momentum": 0.9}, 1e-9, True),  # gradients of 3: 3e-5
        ({"optim__name": "sgd", "optim__momentum": 0.9}, 1e-7, False),
        ({"optim__name": "lars", "optim__momentum": 0.9}, 1e-6, True),
        ({"optim__name": "lars", "optim__momentum": 0.9}, 1e-3, False),
    ],
)
def test_a_rate_that_moves_nothing_is_found_whatever_the_recipe(optim, rate, is_found):
    told = found(rows_of(learning_rate=rate, gradient_norm=3.0), with_settings(**optim))
    assert ("rate_is_zero" in told) == is_found
    if is_found:
        assert f"the learning rate is {rate:.2g} at most, which moves weights by less than" in told["rate_is_zero"].seen


def test_no_row_is_no_finding():
    assert diagnose([], SETTINGS) == []
    assert diagnose([{"step": 0, "epoch": 0.0, "images": 0, "knn_top1": 50.0}], SETTINGS) == []


GUESSING = {
    "dino": (math.log(256), {"num_prototypes": 256}),
    "swav": (math.log(256), {"num_prototypes": 256}),
    "simclr": (math.log(2 * BATCH - 1), {}),
    "nnclr": (math.log(BATCH), {"queue_size": 1000}),
    "moco": (math.log(1001), {"queue_size": 1000, "temperature": 0.2}),
    "moco_v3": (4 * 0.2 * math.log(BATCH), {"temperature": 0.2}),
}


@pytest.mark.parametrize("name", GUESSING)
def test_a_loss_at_guessing_is_found_where_it_began(name):
    guess, method = GUESSING[name]
    settings = with_settings() | {"method": {"name": name, **method}}
    stuck = found(rows_of(loss=lambda row: 0.5 * guess if row < 9 else 0.999 * guess), settings)
    assert stuck.keys() == {"loss_stuck_at_guessing"}
    finding = stuck["loss_stuck_at_guessing"]
    assert finding.step == 500
    assert f"{guess:.3g}" in finding.seen
    assert "optim.lr" in finding.settings
    assert found(rows_of(loss=lambda row: guess if row < 9 else 0.97 * guess), settings) == {}


def test_accumulation_leaves_a_contrastive_loss_fewer_images():
    of_micro_batch = math.log(2 * BATCH // 4 - 1)
    rows = rows_of(loss=of_micro_batch)
    settings = with_settings(train__accumulate=4) | {"method": {"name": "simclr"}}
    assert found(rows, settings).keys() == {"loss_stuck_at_guessing"}
    assert found(rows, settings | {"train": SETTINGS["train"]}) == {}


def test_a_scaled_loss_has_a_scaled_guess():
    settings = with_settings() | {"method": {"name": "simclr", "loss_scale": 2.0}}
    assert found(rows_of(loss=2 * math.log(2 * BATCH - 1)), settings).keys() == {"loss_stuck_at_guessing"}
    assert found(rows_of(loss=math.log(2 * BATCH - 1)), settings) == {}


def test_a_batch_that_a_resumed_run_has_changed_is_the_present_one():
    rows = rows_of(loss=1.0)
    for row in rows[10:]:
        row["images"] += (row["step"] - 500) * BATCH
    assert Case(rows, SETTINGS, None).global_batch == 2 * BATCH


def test_a_young_run_may_guess():
    assert found(rows_of(num_rows=6, every=10, loss=math.log(256))) == {}, "the grace is a tenth of the run"
    assert found(rows_of(loss=math.log(256)), with_settings(optim__lr={"value": 1e-3, "warmup": 900})) == {}


def test_class_loss_is_judged_where_a_loss_is_a_sum():
    assert found(rows_of(loss=9.0, class_loss=3.0)) == {}
    assert found(rows_of(loss=9.0, class_loss=math.log(256))).keys() == {"loss_stuck_at_guessing"}


@pytest.mark.parametrize("metric", ["target_entropy", "patch_target_entropy"])
def test_entropy_at_either_end(metric):
    settings = with_settings(method__num_patch_prototypes=256)
    assert found(rows_of(**{metric: 0.995 * math.log(256)}), settings).keys() == {"teacher_is_uniform"}
    assert found(rows_of(**{metric: 0.001}), settings).keys() == {"teacher_is_one_hot"}
    assert found(rows_of(**{metric: 0.95 * math.log(256)}), settings) == {}
    assert found(rows_of(**{metric: 0.1}), settings) == {}


def test_dead_prototypes():
    assert found(rows_of(prototypes_used=1 / 64)).keys() == {"prototypes_are_dead"}
    assert found(rows_of(prototypes_used=2 / 64)) == {}
    few_images = with_settings(data__batch_size=4)
    assert found(rows_of(prototypes_used=1 / 4), few_images).keys() == {"prototypes_are_dead"}


def test_collapse_of_features():
    finding = found(rows_of(feature_std=lambda row: 0.5 * 0.7**row))["features_collapse"]
    assert finding.step == 400, "0.5 * 0.7^7 is the first below a tenth of the highest"
    assert "fell from 0.5" in finding.seen
    assert found(rows_of(feature_std=lambda row: 0.5 if row % 4 else 0.001)) == {}, "episodes"
    assert found(rows_of(feature_std=0.06)) == {}, "low from the beginning is no fall"


def test_rank_falls():
    column = iter([30.0, 60.0, 58.0, 29.0, 28.0])
    rows = rows_of(num_rows=5, rankme=lambda _: next(column))
    assert found(rows[:4]) == {}, "once may be chance"
    finding = found(rows)["rank_falls"]
    assert (finding.step, finding.seen.split(":")[0]) == (250, "RankMe fell from 60 at step 100 to 28")


def test_knn_that_falls_with_the_loss():
    knn = {1: 70.0, 5: 80.0, 9: 76.0, 13: 75.0}
    rows = rows_of(loss=lambda row: 3.0 - 0.1 * row, knn_top1=lambda row: knn.get(row))
    assert found(rows).keys() == {"knn_falls_with_the_loss"}
    assert found([row | {"loss": 3.0 + row["step"] / 1000} for row in rows]) == {}, "that is another disease"
    assert found(rows[:10]) == {}, "one measurement may be chance"


def test_below_the_start():
    start = {"step": 0, "epoch": 0.0, "images": 0, "knn_top1": 60.0}
    assert found([start, *rows_of(knn_top1=59.0)])["below_the_start"].seen == (
        "k-NN top-1 fell from 60.0 at the start to 59.0."
    )
    assert found([start, *rows_of(knn_top1=59.1)]) == {}


def test_gradients_that_explode():
    rows = rows_of(gradient_norm=lambda row: 500.0 if row == 7 else 2.0)
    finding = found(rows)["gradients_explode"]
    assert finding.step == 400
    assert "250 times" in finding.seen
    assert found(rows_of(gradient_norm=lambda row: 150.0 if row == 7 else 2.0)) == {}
    assert found(rows_of(gradient_norm=lambda row: 500.0 if row < 2 else 2.0)) == {}, "first steps may be steep"


def test_overflows_of_fp16():
    rows = rows_of(gradient_norm=lambda row: None if 3 < row < 8 else 2.0)
    assert found(rows)["fp16_overflows"].step == 250
    live = [row | {"gradient_norm": row["gradient_norm"] or math.inf} for row in rows]
    assert found(live).keys() == {"fp16_overflows"}, "before it is written as null"
    assert found(rows_of(gradient_norm=lambda row: None if row % 3 else 2.0)) == {}
    start = rows_of(num_rows=40, every=1, gradient_norm=lambda row: None if row < 12 else 2.0)
    assert found(start) == {}, "a scaler begins too high, and finds its scale"


def test_a_rate_far_from_the_recipe():
    recipe = {"optim": {"name": "adamw", "lr": 4e-3, "lr_reference_batch": 4 * BATCH}}
    same = with_settings(optim__lr={"value": 1e-3})
    assert found(rows_of(loss=1.0), same, recipe) == {}
    for rate, said in ((0.02, "20 times the recipe's"), (5e-5, "1/20 of the recipe's")):
        finding = found(rows_of(loss=1.0), with_settings(optim__lr={"value": rate}), recipe)["rate_far_from_recipe"]
        assert said in finding.seen
    other = with_settings(optim__lr={"value": 1.0}, optim__name="sgd")
    assert found(rows_of(loss=1.0), other, recipe) == {}, "rates of two optimizers cannot be compared"


def test_a_batch_far_below_what_the_rate_is_for():
    assert found(rows_of(loss=1.0), with_settings(optim__lr_reference_batch=4 * BATCH)) == {}
    finding = found(rows_of(loss=1.0), with_settings(optim__lr_reference_batch=4096))["batch_far_below_reference"]
    assert "64 images" in finding.seen
    assert "4096" in finding.seen


def test_a_run_shorter_than_its_warmup():
    settings = with_settings(optim__lr={"value": 1e-3, "warmup": "40ep"})
    assert found(rows_of(loss=1.0), settings).keys() == {"run_ends_in_warmup"}
    assert found(rows_of(loss=1.0), with_settings(optim__lr={"value": 1e-3, "warmup": "39ep"})) == {}


def test_a_teacher_too_slow_for_the_run():
    settings = with_settings(method__teacher_momentum={"value": 0.999})
    finding = found(rows_of(loss=1.0), settings)["teacher_too_slow"]
    assert "1000 steps renew the teacher 1.0 times" in finding.seen
    assert "to 0.996 or below for a run of this length), or train for longer." in finding.helps
    short = with_settings(method__teacher_momentum={"value": 0.999}, train__steps=4)
    assert found(rows_of(2, every=1, loss=1.0), short)["teacher_too_slow"].helps == "Train for longer."
    assert found(rows_of(loss=1.0), with_settings(method__teacher_momentum=0.996)) == {}
    risen = with_settings(method__teacher_momentum={"value": 0.997, "final": 1.0})
    assert "1.5 times" in found(rows_of(loss=1.0), risen)["teacher_too_slow"].seen, "half of 3 with a cosine to 1"


def test_waiting_for_data():
    assert found(rows_of(data_wait=0.4)).keys() == {"waits_for_data"}
    assert found(rows_of(data_wait=lambda row: 0.4 if row < 3 else 0.02)) == {}


def test_findings_come_in_the_order_of_their_steps():
    rows = rows_of(learning_rate=0.0, gradient_norm=lambda row: 500.0 if row == 7 else 2.0, feature_std=0.001)
    assert [finding.step for finding in diagnose(rows, SETTINGS)] == sorted(
        finding.step for finding in diagnose(rows, SETTINGS)
    )


def test_settings_that_are_missing_or_strange_are_no_error():
    rows = rows_of(loss=1.0, gradient_norm=None, target_entropy=1.0, learning_rate=0.1)
    for settings in ({}, {"method": None}, {"method": {"name": "moco"}, "optim": {"lr": "high"}, "train": {}}):
        assert diagnose(rows[:2], settings, {"optim": 3}) == []

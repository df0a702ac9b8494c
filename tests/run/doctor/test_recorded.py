"""Real runs: those with a disease are recognised, and on healthy ones nothing is found.

tests/run/doctor/record.py has made what is recorded, and makes two of the runs anew here.
"""

import json
from pathlib import Path

import pytest

from ssl_pipeline.run.doctor import diagnose
from tests.run.doctor.record import CASES, FINE_TUNED, HEALTHY, RECORDED, SICK, WITHOUT_HEALTH, digits, record
from tests.tiny import CONFIGS

DISEASES = {
    "byol_teacher_too_slow": {"teacher_too_slow"},
    "dino_rate_30": {"prototypes_are_dead", "below_the_start"},
    "dino_teacher_too_warm": {"loss_stuck_at_guessing", "teacher_is_uniform"},
    "dino_without_centring": {"teacher_is_one_hot", "prototypes_are_dead"},
    "dinov2_too_short": {"loss_stuck_at_guessing", "teacher_is_uniform"},
    "ibot_too_short": {"loss_stuck_at_guessing", "teacher_is_uniform", "below_the_start"},
    "mae_rate_1": {"features_collapse", "below_the_start"},
    "mae_rate_climbs": {"gradients_explode", "run_ends_in_warmup"},
    "moco_rate_10": {"knn_falls_with_the_loss", "below_the_start"},
    "simclr_rate_zero": {"rate_is_zero", "loss_stuck_at_guessing"},
    "vicreg_without_variance": {"knn_falls_with_the_loss"},
}


def recorded(case: str) -> dict:
    return json.loads((RECORDED / f"{case}.json").read_text())


def rules(run: dict, recipe: dict | None = None) -> set[str]:
    return {finding.rule for finding in diagnose(run["rows"], run["config"], recipe)}


def test_most_methods_have_a_healthy_run():
    assert {f"healthy_{name}" for name in CONFIGS.keys() - WITHOUT_HEALTH} | {FINE_TUNED} == set(HEALTHY)
    assert {path.stem for path in RECORDED.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("case", HEALTHY)
def test_nothing_is_found_in_a_healthy_run(case):
    run = recorded(case)
    assert run["exit_code"] == 0
    assert rules(run, recipe=run["config"]) == set()


@pytest.mark.parametrize("case", HEALTHY)
def test_nothing_is_found_at_any_moment_of_a_healthy_run(case):
    run = recorded(case)
    for rows in range(1, len(run["rows"])):
        assert rules(run | {"rows": run["rows"][:rows]}) <= {"below_the_start"}, "it recovers from that"


@pytest.mark.parametrize("case", DISEASES)
def test_a_disease_is_recognised(case):
    assert rules(recorded(case)) == DISEASES[case]


def test_a_rate_of_30_is_far_from_the_recipe():
    healthy, sick = recorded("healthy_simclr"), recorded("simclr_rate_30")
    assert "rate_far_from_recipe" in rules(sick, recipe=healthy["config"])
    assert {*DISEASES, "simclr_rate_30"} == set(SICK)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dino_without_centring", "simclr_rate_zero"])
def test_a_disease_is_recognised_in_a_run_of_today(tmp_path: Path, case):
    assert rules(record(case, digits(tmp_path), tmp_path)) >= DISEASES[case] - {"below_the_start"}

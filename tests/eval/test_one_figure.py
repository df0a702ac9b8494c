"""The part of a protocol that decides one figure of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.config import run_command
from ssl_pipeline.eval import knn, suite
from ssl_pipeline.eval.one_figure import figure_name, protocol_of_figure
from ssl_pipeline.eval.results import protocol_hash, read_results, rows_of

OFF = {"leave_one_out": False, "per_class": None, "seed": 0}
KNN = {"size": 8, "k": [10, 20], "temperature": [0.07, 0.1]}
SUITE = {
    "size": 8,
    "knn": {"k": [20, 10], "temperature": 0.07},
    "linear": {"solver": "logistic", "about": "L-BFGS", "epochs": 10},
}


@pytest.mark.parametrize(
    ("evaluator", "protocol", "figure", "decides"),
    [
        ("knn", KNN, "top5_k20_temperature0.1", {**OFF, "size": 8, "k": [20], "temperature": 0.1}),
        ("knn", KNN, "", {**OFF, "size": 8, "k": [10], "temperature": 0.07}),
        ("knn", {"k": [20, 10], "temperature": 0.07}, "top1_k10", {**OFF, "k": [10], "temperature": 0.07}),
        ("knn", {"k": [9], "temperature": [0.1, 0.07]}, "top1_k9", {**OFF, "k": [9], "temperature": 0.07}),
        ("knn", {"k": [9], "temperature": [0.1, 0.07]}, "", {**OFF, "k": [9], "temperature": 0.1}),
        ("knn", {"k": [10], "temperature": 0.07}, "top1", {**OFF, "k": [10], "temperature": 0.07}),
        ("knn", {"seed": 3, "per_class": None}, "top1_k10", OFF),
        ("knn", {"seed": 3, "per_class": 2}, "top1_k10", {**OFF, "seed": 3, "per_class": 2}),
        (
            "few_shot",
            {"per_class": [1, 5], "fractions": ["1%"]},
            "top1_5_per_class",
            {"per_class": [5], "fractions": []},
        ),
        (
            "few_shot",
            {"per_class": [1], "fractions": ["1 %"]},
            "top1_1_percent",
            {"per_class": [], "fractions": ["1%"]},
        ),
        ("retrieval", {"recall_at": [1, 5], "depth": 9}, "recall_at_5", {"recall_at": [5], "depth": 9}),
        ("retrieval", {"recall_at": [1, 5], "depth": 9}, "map_at_9", {"depth": 9}),
        ("robustness", {"corruptions": ["jpeg", "blur"], "k": 9}, "top1_jpeg", {"corruptions": ["jpeg"], "k": 9}),
        ("robustness", {"corruptions": ["jpeg", "blur"]}, "top1_clean", {"corruptions": []}),
        ("robustness", {"corruptions": ["jpeg", "blur"]}, "top1_mean_corrupted", {"corruptions": ["blur", "jpeg"]}),
        (
            "dense",
            {"heads": ["linear", "knn"], "k": 30, "epochs": 5},
            "miou_linear",
            {"heads": ["linear"], "epochs": 5},
        ),
        (
            "dense",
            {"heads": ["linear", "knn"], "k": 30, "epochs": 5},
            "pixel_accuracy_knn",
            {"heads": ["knn"], "k": 30},
        ),
        ("suite", SUITE, "rankme", {"size": 8}),
        ("suite", SUITE, "balanced_accuracy_knn", {"size": 8, "knn": {**OFF, "k": [20], "temperature": 0.07}}),
        ("suite", SUITE, "knn.top1_k10", {"size": 8, "knn": {**OFF, "k": [10], "temperature": 0.07}}),
        ("suite", SUITE, "sgd.top1", {"size": 8, "linear": {"solver": "sgd", "epochs": 10}}),
        ("linear", {"learning_rates": [0.1, 0.2]}, "top1", {"learning_rates": [0.1, 0.2]}),
    ],
)
def test_a_figure_has_its_own_settings(evaluator: str, protocol: dict, figure: str, decides: dict) -> None:
    assert protocol_of_figure(evaluator, protocol, figure) == decides


def test_the_rest_of_a_list_and_its_order_are_no_other_protocol() -> None:
    alone = protocol_hash("knn", {"k": [10], "temperature": 0.07}, "top1_k10")
    for k in ([10, 20], [20, 10]):
        assert protocol_hash("knn", {"k": k, "temperature": 0.07}, "top1_k10") == alone
        assert protocol_hash("knn", {"k": k, "temperature": 0.07}, "top1_k20") != alone
    several = {"k": [10], "temperature": [0.07, 0.1]}
    assert protocol_hash("knn", several, "top1_k10_temperature0.07") == alone
    assert protocol_hash("knn", several, "top1_k10_temperature0.1") != alone
    rates = [protocol_hash("linear", {"learning_rates": rates}, "top1") for rates in ([0.1], [0.1, 0.2])]
    assert rates[0] != rates[1], "a sweep chooses among its list"


@pytest.mark.parametrize(
    ("temperature", "figure", "name"),
    [
        (0.07, "top1_k10", "top1_k10"),
        (0.1, "top1_k10", "top1_k10_temperature0.1"),
        ([0.07, 0.1], "top5_k10_temperature0.07", "top5_k10"),
        ([0.07, 0.1], "top1_k10_temperature0.1", "top1_k10_temperature0.1"),
        ([0.1, 0.07], "top1_k10", "top1_k10"),
        (0.1, "top1", "top1"),
    ],
)
def test_a_figure_of_an_older_report_has_its_name_of_now(temperature: object, figure: str, name: str) -> None:
    assert figure_name("knn", {"k": [10, 20], "temperature": temperature}, figure) == name
    assert figure_name("robustness", {"temperature": temperature}, figure) == figure


def test_rows_have_the_hash_of_their_own_figure() -> None:
    measures = [
        {"name": f"top1_k{k}", "value": 1.0, "unit": "%", "interval": None, "spread": None, "title": ""}
        for k in (10, 20)
    ]
    protocol = {"k": [10, 20], "temperature": 0.07}
    rows = rows_of({"evaluator": "knn", "measures": measures, "baselines": {}, "protocol": protocol})
    alone = [protocol_hash("knn", {"k": [k], "temperature": 0.07}, f"top1_k{k}") for k in (10, 20)]
    assert [row["protocol"] for row in rows] == alone


def test_the_suite_and_the_knn_evaluator_have_one_protocol(run: Path, train: str, test: str) -> None:
    sets = [f"run={run}", f"train={train}", f"test={test}", "workers=0", "baselines=false"]
    probes = ["solver=sgd", "epochs=1", "learning_rates=[0.1]"]
    assert run_command(suite.SuiteConfig, suite.main, command="", argv=[*sets, *probes, "k=10,5"]) == 0
    assert run_command(knn.KnnConfig, knn.main, command="", argv=[*sets, "k=5"]) == 0
    rows = [row for row in read_results(run / "eval" / "results.csv") if row["measure"] == "top1_k5"]
    assert len(rows) == 1, "the row is replaced"

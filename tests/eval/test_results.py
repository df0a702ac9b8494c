"""results.csv: a row for each result, told apart by the protocol that it was measured by."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.eval import few_shot, knn
from ssl_pipeline.eval.results import (
    COLUMNS,
    add_results,
    comparable,
    differing,
    own_sizes,
    protocol_hash,
    read_reports,
    read_results,
    rows_of,
)

PROTOCOL = {
    "label": "pretrained",
    "subject": {"run": "runs/a", "step": 30, "weights_sha256": "a"},
    "size": 32,
    "mean": [0.5, 0.5, 0.5],
    "torch": "2.6",
    "train": "data/train",
    "train_fingerprint": "t",
    "test": "data/test",
    "test_fingerprint": "u",
    "warnings": ["few images"],
    "linear": {"scikit-learn": "1.5", "epochs": 3},
}


def measure(name: str, value: float, **more: object) -> dict[str, object]:
    return {"name": name, "title": name, "value": value, "unit": "%", "interval": None, "spread": None, **more}


def report(value: float = 50.0, evaluator: str = "few_shot", **protocol: object) -> dict:
    return {
        "evaluator": evaluator,
        "measures": [measure("top1_5_per_class", value, interval=[48.0, 52.0], spread=1.5), measure("other", 1.0)],
        "baselines": {"random": {"measures": [measure("top1_5_per_class", 20.0)], "about": {"weights": "random"}}},
        "protocol": {**PROTOCOL, **protocol},
    }


def test_a_report_is_a_row_for_each_measure_of_each_model() -> None:
    first, second, baseline = rows_of(report())
    assert first == {
        "evaluator": "few_shot",
        "model": "pretrained",
        "label": "pretrained",
        "measure": "top1_5_per_class",
        "value": "50.0",
        "unit": "%",
        "low": "48.0",
        "high": "52.0",
        "spread": "1.5",
        "protocol": protocol_hash("few_shot", PROTOCOL),
        "subject": first["subject"],
        "run": "runs/a",
        "step": "30",
        "train": "data/train",
        "test": "data/test",
        "size": "32",
    }
    assert second["measure"] == "other"
    assert (second["low"], second["spread"]) == ("", "")
    assert (baseline["model"], baseline["value"]) == ("random", "20.0")
    assert baseline["subject"] != first["subject"]


@pytest.mark.parametrize(
    "change",
    [
        {"label": "student"},
        {"subject": {"weights_sha256": "b"}},
        {"mean": [0, 0, 0]},
        {"torch": "2.9"},
        {"train": "elsewhere/train"},
        {"warnings": []},
        {"linear": {"scikit-learn": "1.7", "epochs": 3}},
    ],
)
def test_another_model_place_or_version_is_the_same_protocol(change: dict[str, object]) -> None:
    assert protocol_hash("knn", {**PROTOCOL, **change}) == protocol_hash("knn", PROTOCOL)


@pytest.mark.parametrize("change", [{"size": 64}, {"train_fingerprint": "v"}, {"linear": {"epochs": 4}}, {"k": [20]}])
def test_other_images_or_settings_are_another_protocol(change: dict[str, object]) -> None:
    assert protocol_hash("knn", {**PROTOCOL, **change}) != protocol_hash("knn", PROTOCOL)
    assert protocol_hash("knn", PROTOCOL) != protocol_hash("linear", PROTOCOL)


def test_images_without_a_fingerprint_are_told_by_their_place() -> None:
    assert comparable({"train": "a", "test": "b", "test_fingerprint": "u"}) == {"train": "a", "test_fingerprint": "u"}


def test_differences_are_named_with_their_values() -> None:
    protocols = {"a": PROTOCOL, "b": {**PROTOCOL, "size": 64, "linear": {"epochs": 4}, "torch": "3"}}
    assert differing(protocols) == ["size: a 32, b 64", "linear.epochs: a 3, b 4"]
    assert differing({"a": PROTOCOL, "b": {**PROTOCOL, "label": "other"}}) == []


def test_sizes_may_differ_where_each_is_the_networks_own() -> None:
    own, larger = {**PROTOCOL, "own_size": 32}, {**PROTOCOL, "size": 64, "own_size": 64}
    assert differing({"a": own, "b": larger}) == []
    assert own_sizes({"a": own, "b": larger}) == "Each network was measured as it was trained (size: a 32, b 64)."
    assert own_sizes({"a": own, "b": own}) == ""
    for by_hand in (
        {**own, "size": 64},
        {**PROTOCOL, "size": 64},
    ):  # asked for; of an older version, which does not say
        assert differing({"a": own, "b": {**by_hand, "seed": 1}}) == ["size: a 32, b 64", "seed: a null, b 1"]
        assert own_sizes({"a": own, "b": by_hand}) == ""
    assert protocol_hash("knn", own) == protocol_hash("knn", PROTOCOL), "rows of older versions are replaced"


def test_evaluators_write_the_size_that_is_the_networks_own(run: Path, train: str, test: str, tmp_path: Path) -> None:
    sets = [f"train={train}", f"test={test}", "workers=0", "k=5"]
    named = ["backbone=test_resnet", "size=32"]
    for given, sizes in ((["size=24"], (24, 16)), ([], (16, 16)), (named, (32, 224))):
        model = given if given == named else [f"run={run}", *given]
        argv = [*sets, *model, f"output={tmp_path}"]
        assert run_command(knn.KnnConfig, knn.main, command="", argv=argv) == 0
        protocol = read_reports(tmp_path)["knn"]["protocol"]
        assert (protocol["size"], protocol["own_size"]) == sizes


def test_the_same_result_is_replaced_and_others_stay(tmp_path: Path) -> None:
    add_results(tmp_path, report(50.0))
    add_results(tmp_path, report(60.0, size=64))
    add_results(tmp_path, report(70.0))
    add_results(tmp_path, report(80.0, subject={"weights_sha256": "b"}))
    rows = [row for row in read_results(tmp_path / "results.csv") if row["measure"] == "top1_5_per_class"]
    own = [(row["value"], row["size"]) for row in rows if row["model"] == "pretrained"]
    assert own == [("60.0", "64"), ("70.0", "32"), ("80.0", "32")]
    assert len({row["protocol"] for row in rows}) == 2


def test_a_figure_of_k_nn_by_its_older_name_is_replaced(tmp_path: Path) -> None:
    for name, temperature in (("top1_k10_temperature0.07", [0.07, 0.1]), ("top1_k10", 0.1), ("top1_k10", 0.07)):
        add_results(tmp_path, knn_report(name, temperature))
    add_results(tmp_path, knn_report("top1_k10_temperature0.1", 0.1))
    rows = read_results(tmp_path / "results.csv")
    assert [row["measure"] for row in rows] == ["top1_k10", "top1_k10_temperature0.1"]


def knn_report(name: str, temperature: object) -> dict:
    protocol = {"k": [10], "temperature": temperature}
    return {"evaluator": "knn", "measures": [measure(name, 50.0)], "baselines": {}, "protocol": protocol}


def test_a_file_with_other_columns_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text('evaluator,measure,note\nknn,top1,"mine, by hand"\n')
    add_results(tmp_path, report())
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["evaluator"], rows[0]["measure"], rows[0]["value"]) == ("knn", "top1", "")


def test_reports_are_read_in_one_order_with_and_without_picked_ones(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for name in ("clustering", "knn-student", "suite", "linear", "knn"):
        (tmp_path / "eval" / f"{name}.json").write_text('{"baselines": {}, "protocol": {}}')
    assert list(read_reports(tmp_path)) == ["suite", "knn", "linear", "clustering"]
    assert list(read_reports(tmp_path, picked=True)) == ["suite", "knn", "linear", "clustering", "knn-student"]
    (tmp_path / "eval" / "knn-student.json").write_text('{"baselines": {}}')
    assert len(read_reports(tmp_path)) == 4
    with pytest.raises(ConfigError, match=r"knn-student.json is not a report of eval.knn \('protocol'\). Run python"):
        read_reports(tmp_path, picked=True)


def test_evaluators_write_their_rows(run: Path, train: str, test: str) -> None:
    sets = [f"run={run}", f"train={train}", f"test={test}", "workers=0", "baselines=true"]
    for _ in range(2):
        assert run_command(knn.KnnConfig, knn.main, command="", argv=[*sets, "k=5,10"]) == 0
    more = ["per_class=2", "fractions=[]", "draws=2"]
    assert run_command(few_shot.FewShotConfig, few_shot.main, command="", argv=[*sets, *more]) == 0
    rows = read_results(run / "eval" / "results.csv")
    of_knn = [row["measure"] for row in rows if row["evaluator"] == "knn" and row["model"] == "pretrained"]
    assert of_knn == ["top1_k5", "top5_k5", "top1_k10", "top5_k10"]
    assert {row["model"] for row in rows if row["evaluator"] == "few_shot"} == {"raw_pixels", "random", "pretrained"}
    assert len({row["protocol"] for row in rows}) == 3, "k=5, k=10, two of each class"
    assert run_command(knn.KnnConfig, knn.main, command="", argv=[*sets, "k=10"]) == 0
    assert len(read_results(run / "eval" / "results.csv")) == len(rows), "the rows of k=10 are replaced"
    hashes = {row["measure"]: row["protocol"] for row in rows if row["evaluator"] == "knn"}
    assert read_reports(run)["knn"]["protocol_hash"] == hashes["top1_k10"]

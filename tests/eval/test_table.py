import json
from pathlib import Path

import pytest

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.eval.differences import doubts
from ssl_pipeline.eval.measures import format_table
from ssl_pipeline.eval.table import (
    ReportedModel,
    TableConfig,
    main,
    read_run,
    reported_model,
    summary,
    titles_of,
    top1_of,
)


def write(run: Path, name: str, top1: float, protocol: dict[str, object] | None = None, **baselines: float) -> None:
    (run / "eval").mkdir(exist_ok=True)
    report: dict[str, object] = {
        "top1": top1,
        "baselines": {model: {"top1": value} for model, value in baselines.items()},
    }
    report["protocol"] = protocol or {}
    (run / "eval" / f"{name}.json").write_text(json.dumps(report))


def test_columns_are_aligned() -> None:
    assert format_table(["", "top-1"], [["raw pixels", "9.0"], ["pretrained", "10.25"]]).splitlines() == [
        "            top-1",
        "-----------------",
        "raw pixels    9.0",
        "pretrained  10.25",
    ]


def test_one_row_per_model_and_one_column_per_evaluator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "knn", 96.0, raw_pixels=90.0, random=84.0)
    write(tmp_path, "linear", 97.5, raw_pixels=95.0, random=91.25)
    assert run_command(TableConfig, main, command="python -m eval.table", argv=[f"run={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["k-NN", "top-1", "linear", "probe", "top-1"]
    assert lines[2].split() == ["raw", "pixels", "90.00", "%", "95.00", "%"]
    assert lines[3].split() == ["random", "initialisation", "84.00", "%", "91.25", "%"]
    assert lines[4].split() == ["pretrained", "96.00", "%", "97.50", "%"]
    assert lines[6:] == [
        "The pretrained backbone is ahead of raw pixels in k-NN top-1 and linear probe top-1.",
        "k-NN error: 16.00 % at random initialisation, 4.00 % pretrained: 4.0 times smaller.",
    ]


def told(run: Path, reported: ReportedModel | None = None) -> str:
    reports = read_run(run)
    return summary(top1_of(reports, run), titles_of(reports), reported or ReportedModel())


def about(label: str, weights: str, **more: str) -> dict[str, object]:
    return {"label": label, "subject": {"backbone": {"name": "resnet18"}, "weights": weights, **more}}


def test_a_network_is_called_what_it_is_and_its_weights_are_told(tmp_path: Path) -> None:
    protocol = about("resnet18 at random initialisation", "random initialisation, seed 0")
    for name in ("knn", "linear"):
        write(tmp_path, name, 96.0, protocol, raw_pixels=90.0, random=97.0)
    reported = reported_model(read_run(tmp_path), tmp_path)
    text = told(tmp_path, reported)
    assert "pretrained" not in text
    assert "resnet18 at random initialisation is ahead of raw pixels in k-NN top-1 and linear probe top-1." in text
    assert text.splitlines()[-1] == "resnet18 at random initialisation: random initialisation, seed 0"


def test_reports_of_different_networks_are_not_joined(tmp_path: Path) -> None:
    write(tmp_path, "knn", 96.0, about("pretrained", "exported", weights_sha256="a", run="x"))
    write(tmp_path, "linear", 97.0, about("pretrained", "exported", weights_sha256="a", run="moved"))
    assert reported_model(read_run(tmp_path), tmp_path).label == "pretrained"
    write(tmp_path, "linear", 97.0, about("teacher, step 3", "teacher of step 3", weights_sha256="b"))
    with pytest.raises(ConfigError, match=r"networks: pretrained \(exported\), and teacher, step 3 \(teacher of"):
        reported_model(read_run(tmp_path), tmp_path)


def report_of(top1: float, interval: tuple[float, float], **more: object) -> dict[str, object]:
    return {"top1": top1, "top1_interval": interval, **more}


def test_differences_within_the_interval_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    baselines = {"raw_pixels": report_of(94.0, (91.0, 96.0)), "random": report_of(80.0, (76.0, 84.0))}
    report = report_of(
        95.0, (92.0, 97.0), baselines=baselines, protocol_hash="0123456789abcdef", solver="sgd", protocol={}
    )
    (tmp_path / "eval" / "linear.json").write_text(json.dumps(report))
    few = [measure("one", 40.0, interval=[38, 42]), measure("ten", 60.0, interval=[58, 62])]
    random = [measure("one", 39.0, interval=[37, 41]), measure("ten", 50.0, interval=[48, 52])]
    shots = {"measures": few, "baselines": {"random": {"measures": random}}, "protocol": {}}
    (tmp_path / "eval" / "few_shot.json").write_text(json.dumps(shots))
    main(TableConfig(run=tmp_path))
    printed = capsys.readouterr().out
    assert "\nDifference within the interval: linear probe top-1 of pretrained and raw pixels.\n" in printed
    assert "Protocols, as in eval/results.csv: linear probe top-1 0123456789abcdef.\n" in printed
    assert "\nDifference within the interval to random initialisation: one.\n" in printed


def test_the_two_protocols_of_linear_classifiers_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    of_another = {"raw_pixels": {"top1": 99.0, "solver": "sgd"}, "random": {"top1": 80.0, "solver": "logistic"}}
    report = {"top1": 95.0, "solver": "logistic", "baselines": of_another, "protocol": {}}
    (tmp_path / "eval" / "linear.json").write_text(json.dumps(report))
    main(TableConfig(run=tmp_path))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].strip() == "logistic regression top-1"
    assert "99.00" not in printed, "pixels were measured by the other one"
    assert "warning: logistic regression top-1 leaves out raw_pixels: another classifier was trained." in printed


def test_raw_pixels_that_win_are_named(tmp_path: Path) -> None:
    write(tmp_path, "knn", 96.0, raw_pixels=98.6, random=97.0)
    write(tmp_path, "linear", 97.5, raw_pixels=95.0, random=91.25)
    text = told(tmp_path)
    assert "Raw pixels beat the pretrained backbone in k-NN top-1: 98.60 % against 96.00 %." in text
    assert "is ahead of raw pixels in linear probe top-1." in text
    assert "3.00 % at random initialisation, 4.00 % pretrained: 1.3 times larger." in text


def test_what_was_not_measured_is_left_open(tmp_path: Path) -> None:
    write(tmp_path, "knn", 96.0)
    text = told(tmp_path)
    assert "linear" not in text
    assert "No baselines were measured" in text


def test_no_error_left_is_no_division_by_zero(tmp_path: Path) -> None:
    write(tmp_path, "knn", 100.0, random=84.0, raw_pixels=100.0)
    text = told(tmp_path)
    assert "0.00 % pretrained: none is left." in text
    assert "Raw pixels equal the pretrained backbone" in text


def test_a_run_without_reports_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"python -m eval.knn run=.* baselines=true"):
        top1_of(read_run(tmp_path), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"top1": 3}', '{"top1": null, "baselines": {}}'])
def test_a_broken_report_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "knn.json").write_text(content)
    with pytest.raises(ConfigError, match=r"knn.json is not a report of eval.knn"):
        top1_of(read_run(tmp_path), tmp_path)


def write_protocols(run: Path, **protocols: dict[str, object]) -> None:
    (run / "eval").mkdir(parents=True)
    for name, protocol in protocols.items():
        report = {"top1": 50.0, "baselines": {}, "protocol": {"train": "a", "test": "b", "size": 32, **protocol}}
        (run / "eval" / f"{name}.json").write_text(json.dumps(report))


def test_columns_of_the_same_images_are_not_doubted(tmp_path: Path) -> None:
    write_protocols(tmp_path, knn={"leave_one_out": False}, linear={})
    reports = read_run(tmp_path)
    assert doubts(reports, titles_of(reports)) == []


@pytest.mark.parametrize("other", [{"test": "a", "leave_one_out": True}, {"test": "c"}, {"train": "c"}, {"size": 64}])
def test_columns_of_other_images_are_said_not_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, object]
) -> None:
    write_protocols(tmp_path, knn=other, linear={"warnings": ["40 of 40 images are in train too"]})
    main(TableConfig(run=tmp_path))
    printed = capsys.readouterr().out
    assert "warning: 40 of 40 images are in train too\n" in printed
    title = "k-NN top-1, leave_one_out=true" if "leave_one_out" in other else "k-NN top-1"
    assert f"warning: The columns are not of the same images and must not be compared: {title}: train=" in printed


@pytest.mark.parametrize(
    ("protocol", "title"),
    [
        ({}, "k-NN top-1"),
        ({"k": [20, 10], "temperature": [0.07, 0.1], "leave_one_out": False}, "k-NN top-1"),
        ({"k": [10, 20], "temperature": 0.07}, "k-NN top-1, k=10"),
        ({"k": [20], "temperature": 0.1}, "k-NN top-1, temperature=0.1"),
        (
            {"k": [5], "temperature": [0.2, 0.07], "leave_one_out": True},
            "k-NN top-1, k=5, temperature=0.2, leave_one_out=true",
        ),
        ({"k": [20], "per_class": 3}, "k-NN top-1, per_class=3"),
    ],
)
def test_knn_is_called_by_the_settings_that_are_not_the_default_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: dict[str, object], title: str
) -> None:
    write(tmp_path, "knn", 96.0, protocol, raw_pixels=90.0)
    main(TableConfig(run=tmp_path))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].strip() == title
    assert f"is ahead of raw pixels in {title}." in printed


def measure(name: str, value: float, **more: object) -> dict[str, object]:
    return {"name": name, "title": name, "value": value, "unit": "%", "interval": None, "spread": None, **more}


def test_other_evaluators_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    report = {
        "evaluator": "few_shot",
        "measures": [measure("one", 40.0, spread=2.0, interval=[38, 42]), measure("ten", 60.0)],
        "baselines": {"random": {"measures": [measure("ten", 20.0)]}},
        "protocol": {"label": "student", "warnings": ["few images"]},
    }
    (tmp_path / "eval" / "few_shot.json").write_text(json.dumps(report))
    (tmp_path / "eval" / "few_shot-student.json").write_text("of a network that somebody picked")
    main(TableConfig(run=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["few", "shot", "random", "initialisation", "student"]
    assert lines[2].split() == ["one", "-", "40.00", "%", "+-", "2.00", "(38.0", "to", "42.0)"]
    assert lines[3].split() == ["ten", "20.00", "%", "60.00", "%"]
    assert lines[-1] == "warning: few images"


def test_a_report_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("knn", "linear"):
        write(tmp_path, name, 96.0, about("pretrained", "exported"), raw_pixels=90.0, random=97.0)
    original, read = Path.read_text, []
    monkeypatch.setattr(
        Path, "read_text", lambda path, *args, **more: read.append(path.name) or original(path, *args, **more)
    )
    main(TableConfig(run=tmp_path))
    assert sorted(read) == ["knn.json", "linear.json"]


def test_a_run_that_is_not_there_is_no_run_without_reports(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none must be the directory of a run\. There is no such directory\.$"):
        read_run(tmp_path / "none")


def test_several_runs_are_sent_to_the_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.table shows one run.*eval\.report run=.*a,b compares several"):
        read_run(tmp_path / "a,b")

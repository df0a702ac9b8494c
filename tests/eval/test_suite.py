"""The suite finds what each evaluator finds alone, from one feature pass, and tells what is confused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.eval import few_shot, knn, linear, retrieval, suite, table
from ssl_pipeline.eval.accuracy import Confused, by_class
from ssl_pipeline.eval.features import passes
from ssl_pipeline.eval.suite_measures import SuiteConfig, spectrum
from tests.ranks import run_on_ranks

FAST = ["workers=0", "epochs=3", "learning_rates=[0.5,2.0]", "inverse_penalties=[0.1,1.0]"]


def call(*arguments: str) -> int:
    return run_command(SuiteConfig, suite.main, command="python -m eval.suite", argv=[*FAST, *arguments], shared=True)


def report(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


@pytest.mark.other
def test_one_pass_gives_what_the_evaluators_give_alone(
    run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, passes_made = passes.forward_passes, []
    monkeypatch.setattr(
        passes, "forward_passes", lambda *args, **more: passes_made.append(1) or original(*args, **more)
    )
    sets = [f"run={run}", f"train={train}", f"test={test}"]
    assert call(*sets, "k=[5,10,200]") == 0
    printed, warned = capsys.readouterr()
    assert "k=200 is left out: there are 72 training images" in warned
    assert len(passes_made) == 6  # three models, two sets
    found = {name: report(run, name) for name in ("suite", "knn", "linear")}
    own = [*sets, "workers=0", "baselines=true"]
    assert run_command(knn.KnnConfig, knn.main, command="", argv=[*own, "k=[5,10]"]) == 0
    assert run_command(linear.LinearConfig, linear.main, command="", argv=[*own, *FAST[1:]]) == 0
    assert len(passes_made) == 6
    for name in ("knn", "linear"):
        alone = report(run, name)
        assert alone.keys() == found[name].keys()
        for model in ("raw_pixels", "random"):
            assert found[name]["baselines"][model]["top1"] == alone["baselines"][model]["top1"]
        assert found[name]["top1"] == alone["top1"]
        assert found["suite"][{"knn": "knn", "linear": "logistic"}[name]]["top1"] == alone["top1"]
    assert "\nlogistic regression, pretrained, by class:\n" in capsys.readouterr().out
    reports = table.read_run(run)
    assert table.top1_of(reports, run)["knn"]["pretrained"] == found["knn"]["top1"]
    assert table.reported_model(reports, run).label == "pretrained"
    capsys.readouterr()
    rows = {line[:30].split("  ")[0]: line for line in printed.splitlines()}
    for name in ("k-NN top-1, k=5", "k-NN top-1, k=10", "linear probe top-1", "logistic regression top-1"):
        assert rows[name].count(" to ") == 3, "an interval for each model"
    for name in ("k-NN, k=5, balanced", "RankMe", "alpha-ReQ"):
        assert name in rows
    assert found["suite"]["by_class"]["knn"]["per_class"][0].keys() == {"class", "images", "top1", "precision"}
    assert len(found["suite"]["neighbours"]["train"][0]) == 5


def test_a_quick_measure_afterwards_takes_no_place_of_the_suites(
    run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"train={train}", f"test={test}"]
    assert call(f"run={run}", *sets, "k=[5,10]", "solver=logistic") == 0
    full = report(run, "knn")["top1"]

    def columns(*quick: str, sets: list[str] = sets) -> tuple[list[str], list[str]]:
        assert run_command(knn.KnnConfig, knn.main, command="", argv=[f"run={run}", "workers=0", *sets, *quick]) == 0
        said = capsys.readouterr().out
        table.main(table.TableConfig(run=run))
        printed = capsys.readouterr().out.splitlines()
        assert f"{full:.2f} %" in printed[4]
        return [re.sub("  +", "|", line.strip()) for line in printed], said.splitlines()

    same, said = columns("k=5")  # no baselines: those of the suite stay
    assert same[0] == "k-NN top-1, k=5|logistic regression top-1"
    assert "-|" not in same[2]
    assert not [line for line in said if "other settings" in line]
    other, said = columns("k=3", "per_class=2")
    assert other[0] == "k-NN top-1, k=5|k-NN top-1, k=3, per_class=2|logistic regression top-1"
    assert other[2].split("|")[2] == "-"  # raw pixels were not measured with these
    assert f"{report(run, 'knn')['top1']:.2f} %" in other[4]
    assert (
        f"{run}/eval/knn.json had figures of other settings (now k=3, per_class=2); they stay in results.csv." in said
    )
    fewer, _ = columns("k=5", sets=[f"train={test}", f"test={train}"])
    assert fewer[0].startswith("k-NN top-1, k=5|k-NN top-1, k=5, num_train=")


def test_pixels_too_wide_for_the_classifier_that_the_network_has(
    run: Path, train: str, test: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 72 * 24  # numbers in the network's training features; the pixels have more
    monkeypatch.setattr("ssl_pipeline.eval.linear.LARGEST_LOGISTIC", limit)
    monkeypatch.setattr("ssl_pipeline.eval.suite_measures.LARGEST_LOGISTIC", limit)
    assert call(f"run={run}", f"train={train}", f"test={test}", "k=5") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("logistic regression top-1"))
    assert row.split()[3] == "-"
    linear_report, own = report(run, "linear"), report(run, "suite")
    of_baselines = [baseline["solver"] for baseline in linear_report["baselines"].values()]
    assert [linear_report["protocol"]["solver"], linear_report["solver"], *of_baselines] == ["sgd"] * 4
    assert own["top1"] == own["sgd"]["top1"] == linear_report["top1"]
    assert own["logistic"]["solver"] == "logistic"


def test_classes_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, labels, labels.roll(1))
    found = by_class(predicted, labels, num_classes=6)
    classes = list(range(6))
    assert found.balanced == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    for ours, theirs in ((found.recall, recall_score), (found.precision, precision_score)):
        expected = torch.tensor(theirs(labels, predicted, average=None, labels=classes)) * 100
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
    assert found.images.tolist() == torch.bincount(labels).tolist()


def test_the_most_frequent_mistakes_come_first() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([1, 1, 0, 2, 1, 0, 2])
    found = by_class(predicted, labels, num_classes=4, pairs=2)
    assert found.confused == (Confused(0, 1, 2), Confused(1, 2, 1))
    assert found.recall[3].isnan()
    assert found.precision[3].isnan()
    assert found.balanced == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_classes_are_called_by_their_names(write_shards: Callable[..., Path], tmp_path: Path) -> None:
    names = ("cat", "dog", "owl")
    train = write_shards(tmp_path / "train", [0, 1, 2] * 8, names=names, seed=1)
    test = write_shards(tmp_path / "test", [2, 1, 2, 1], names=names, seed=2)
    sets = ["backbone=raw_pixels", "size=16", f"train={train}", f"test={test}", f"output={tmp_path}"]
    assert call(*sets, "k=3", "baselines=false", "solver=sgd") == 0
    found = report(tmp_path, "suite")
    per_class = found["by_class"]["sgd"]["per_class"]
    assert [(row["class"], row["images"]) for row in per_class] == [("cat", 0), ("dog", 2), ("owl", 2)]
    assert per_class[0]["top1"] is None
    assert set(found["by_class"]) == {"knn", "sgd"}


def test_k_beyond_the_images_is_refused_before_anything_is_measured(
    train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("backbone=raw_pixels", f"train={train}", f"test={test}", "k=500") == 2
    assert "number of training images (72). Got k=500" in capsys.readouterr().err


def test_too_few_images_for_alpha_are_no_error() -> None:
    _, _, alpha = spectrum(torch.eye(4))
    assert alpha is None
    with pytest.raises(ValueError, match="finite"):
        spectrum(torch.full((4, 4), torch.nan))


@pytest.mark.parametrize("evaluator", [suite, knn])
def test_nothing_is_kept_without_a_place_for_it(
    evaluator: ModuleType, train: str, test: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"train={train}", f"test={test}", "k=3", "baselines=false", "workers=0"]
    monkeypatch.setattr("sys.argv", ["", "backbone=raw_pixels", "size=4", *sets])
    assert evaluator.command() == 0
    assert "nothing is kept" in capsys.readouterr().err


def on_a_rank(arguments: list[str]) -> int:
    return call(*arguments)


def test_several_processes_write_one_report(run: Path, train: str, test: str) -> None:
    sets = [f"run={run}", f"train={train}", f"test={test}", "k=5"]
    assert call(*sets) == 0
    alone = report(run, "suite")
    for path in run.glob("eval/*.json"):
        path.unlink()
    for path in (run / "eval" / "cache").iterdir():
        path.rename(run / path.name)
    assert run_on_ranks(on_a_rank, sets) == [0, 0]
    assert report(run, "suite")["knn"]["top1"] == alone["knn"]["top1"]


def test_features_that_are_not_finite_are_refused() -> None:
    from ssl_pipeline.eval.protocol import LabelledFeatures
    from ssl_pipeline.eval.suite_measures import measure_all

    broken = LabelledFeatures(
        torch.full((4, 3), torch.nan), torch.arange(4) % 2, torch.ones(2, 3), torch.ones(2).long(), 2
    )
    config = SuiteConfig(backbone="raw_pixels", train="a", test="b", k=(2,))
    with pytest.raises(ConfigError, match="finite features"):
        measure_all(broken, config)


@pytest.mark.other
def test_other_evaluators_measure_the_same_features(
    run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"run={run}", f"train={train}", f"test={test}"]
    assert call(*sets, "k=5", "also=few_shot,retrieval") == 0
    together = {name: report(run, name) for name in ("few_shot", "retrieval")}
    own = [*sets, "workers=0", "baselines=true"]
    assert run_command(few_shot.FewShotConfig, few_shot.main, command="", argv=own) == 0
    assert run_command(retrieval.RetrievalConfig, retrieval.main, command="", argv=own) == 0
    assert {name: report(run, name) for name in together} == together
    assert call(*sets, "k=5") == 0
    assert "other settings" not in capsys.readouterr().out  # the same ones again replace nothing


def test_what_others_cannot_measure_is_told_before_anything_is_measured(
    train: str, write_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_shards(tmp_path / "few", [0, 1, 0, 1])
    assert call("backbone=raw_pixels", f"train={few}", f"test={train}", "k=2", "also=retrieval") == 2
    assert "the number of images that can be found (4). Got 10" in capsys.readouterr().err

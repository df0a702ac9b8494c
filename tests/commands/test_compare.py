"""eval.compare with a stand-in for pretraining: a run that appears as an exported backbone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.commands.compare import CompareConfig, Comparison, checked, compare, summary
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.eval.differences import runs_within_interval

Pretrain = Callable[[Sequence[str]], None]


@pytest.fixture
def pretrain(run: Path) -> Pretrain:
    """Leaves behind what an evaluator needs of a run."""

    def export(arguments: Sequence[str]) -> None:
        output = Path(dict(argument.split("=", 1) for argument in arguments)["output"])
        output.mkdir(parents=True)
        for file in run.iterdir():
            (output / file.name).write_bytes(file.read_bytes())

    return export


def config(output: Path, train: str, test: str, *arguments: str) -> CompareConfig:
    own = {"train": train, "test": test, "output": str(output), "k": "3"}
    paths = [f"{key}={value}" for key, value in own.items() if not any(one.startswith(f"{key}=") for one in arguments)]
    recipes = [] if any(argument.startswith("recipes=") for argument in arguments) else ["recipes=first,second"]
    return load(CompareConfig, [*recipes, "seeds=0,1", *paths, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes=digits_dino,digits_dimo"], r"^digits_dimo: No recipe 'digits_dimo'\. Did you mean 'digits_dino'"),
        (["recipes=digits_dino", "runs.b=[recipe=digits_dino,optim.lr.valu=3]"], r"^b: Unknown key 'optim\.lr\.valu'"),
        (["recipes=digits_dino", "settings=train.epochs=no"], r"^digits_dino: train\.epochs"),
        (
            ["recipes=digits_dino", "runs.b=[recipe=digits_dino,backbone.name=resnet19]"],
            r"^b: No timm model 'resnet19'",
        ),
        (
            ["recipes=digits_dino", "runs.b=[recipe=digits_dino,data.shards=nothing]"],
            r"^b: There is no directory or file",
        ),
        (
            ["recipes=digits_dino", "runs.b=[recipe=digits_dino,backbone.weights={output}/c-seed{seed}]"],
            r"^b: .* is of no run that is listed before this one \(digits_dino\): 'c'",
        ),
        (["recipes=digits_dino", "k=1000"], r"k-NN needs k between 1 and the number of training images \(\d+\)"),
        (["recipes=digits_dino", "test=nowhere"], r"test=nowhere does not exist"),
        (["recipes=digits_dino", "runs.b=[recipe=digits_dino,images=photos]"], None),  # packed when its turn comes
        (["recipes=digits_dino", "runs.b=[recipe=digits_dino,backbone.weights={output}/digits_dino-seed{seed}]"], None),
    ],
)
def test_what_is_wrong_with_a_later_run_is_told_before_the_first(tmp_path, train, test, arguments, message) -> None:
    if not any(argument.startswith("settings=") for argument in arguments):
        arguments = [*arguments, f"settings=data.shards={train}"]
    given = config(tmp_path / "out", train, test, *arguments)
    if message is None:
        assert checked(given) == given
        return
    with pytest.raises(ConfigError, match=message):
        checked(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_recipe_runs_once_per_seed_with_the_settings(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain
) -> None:
    calls: list[Sequence[str]] = []

    def record(arguments: Sequence[str]) -> None:
        calls.append(arguments)
        pretrain(arguments)

    out = tmp_path / "compared"
    found = compare(config(out, train, test, "settings=train.epochs=1,knn=null"), record)

    assert calls == [
        [f"recipe={recipe}", "train.epochs=1", "knn=null", f"seed={seed}", f"output={out / f'{recipe}-seed{seed}'}"]
        for recipe in ("first", "second")
        for seed in (0, 1)
    ]
    for recipe in ("first", "second"):
        for evaluator in ("knn", "linear"):
            assert {model: len(values) for model, values in found.top1[recipe][evaluator].items()} == {
                "raw_pixels": 2,
                "random": 2,
                "pretrained": 2,
            }
            assert (out / f"{recipe}-seed1" / "eval" / f"{evaluator}.json").is_file()


def test_a_run_with_arguments_of_its_own_takes_the_other_settings(tmp_path: Path, train: str, test: str) -> None:
    arguments = config(
        tmp_path, train, test, "runs.small=[recipe=first, train.epochs=5]", "settings=train.epochs=1,knn=null"
    ).arguments()
    assert arguments == {
        "first": ["recipe=first", "train.epochs=1", "knn=null"],
        "second": ["recipe=second", "train.epochs=1", "knn=null"],
        "small": ["recipe=first", "train.epochs=5", "knn=null"],
    }


def comparison(**runs: dict[str, list[float]]) -> Comparison:
    top1 = {name: {"knn": scores, "linear": scores} for name, scores in runs.items()}
    titles = {name: {"knn": "k-NN top-1", "linear": "linear probe top-1"} for name in runs}
    return Comparison(top1, {name: [] for name in runs}, {"knn_top1": {}}, titles, {name: {} for name in runs})


def test_runs_that_are_not_told_apart_are_named() -> None:
    runs = {
        name: {"raw_pixels": [50.0], "random": [10.0], "pretrained": [top1]}
        for name, top1 in (("first", 70.0), ("second", 72.0), ("third", 60.0))
    }
    found = comparison(**runs)
    found.intervals["first"]["knn"], found.intervals["second"]["knn"] = (68.0, 72.0), (70.0, 74.0)
    found.intervals["third"]["knn"] = (58.0, 62.0)
    found.titles["third"]["linear"] = "logistic regression top-1"
    text = summary(found, 1)
    assert "\nk-NN top-1: second is ahead; difference within the interval to first.\n" in text + "\n"
    assert "linear probe top-1: " not in text, "without intervals nothing is said"
    assert [line for line in text.splitlines() if line.startswith("third") and "logistic regression top-1" in line]


def test_runs_with_the_same_figure_are_equal_and_none_is_ahead() -> None:
    interval = (70.0, 80.0)
    found = {"one": (75.0, interval), "two": (75.0, interval), "three": (74.0, interval), "four": (10.0, (9.0, 11.0))}
    assert runs_within_interval("k-NN", found) == ["k-NN: one, two are equal; difference within the interval to three."]
    assert runs_within_interval("k-NN", {name: found[name] for name in ("one", "two")}) == ["k-NN: one, two are equal."]


def test_protocols_that_differ_are_said() -> None:
    scores = {"raw_pixels": [50.0], "random": [10.0], "pretrained": [70.0]}
    found = comparison(mine=scores)
    assert "protocols" not in summary(found, 1)
    found.protocols["knn"] = ["size: first-seed0 32, second-seed0 64"]
    lines = summary(found, 1).splitlines()
    assert "warning: The protocols of eval.knn differ" in lines[-2]
    assert lines[-1] == "  size: first-seed0 32, second-seed0 64"


def test_the_table_has_mean_and_spread_over_seeds() -> None:
    scores = {"raw_pixels": [50.0, 50.0], "random": [10.0, 20.0], "pretrained": [70.0, 80.0]}
    found = comparison(mine=scores)
    text = summary(found, 2)
    assert "15.00 % +- 7.07" in text
    assert "75.00 % +- 7.07" in text
    assert "never of the best one; mean +- standard deviation over 2 seeds" in text
    assert "classifier" not in text
    assert "during the runs" not in text


@pytest.mark.slow
def test_monitored_k_nn_and_the_methods_own_classifier_are_read_from_the_metrics(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain
) -> None:
    def log(arguments: Sequence[str]) -> None:
        pretrain(arguments)
        output = Path(dict(argument.split("=", 1) for argument in arguments)["output"])
        better = 10 * output.name.endswith("seed1")
        rows = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "knn_top1": 30.0 + better}, {"epoch": 4, "knn_top1": 50.0}]
        rows[-1]["classifier_top1"] = 60.0 + better
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = compare(config(tmp_path, train, test, "recipes=only"), log)
    assert found.curves == {"knn_top1": {"only": [(2, 35.0), (4, 50.0)]}, "classifier_top1": {"only": [(4, 65.0)]}}
    assert found.classifier == {"only": [60.0, 70.0]}
    text = summary(found, 2)
    assert "only: 2: 35.0  4: 50.0" in text
    assert "only: 4: 65.0" in text
    assert "65.00 % +- 7.07" in text


def test_a_long_curve_is_thinned_to_its_end() -> None:
    scores = {"raw_pixels": [50.0], "random": [10.0], "pretrained": [70.0]}
    points = [(float(epoch), float(epoch)) for epoch in range(1, 101)]
    text = summary(replace(comparison(mine=scores), curves={"knn_top1": {"mine": points}}), 1)
    assert "mine: 16: 16.0  33: 33.0  50: 50.0  66: 66.0  83: 83.0  100: 100.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["settings=seed=3"], r"settings must leave recipe and seed and output to eval.compare. Got 'seed=3'"),
        (["runs.mine=[recipe=first, output=x]"], r"runs.mine must leave seed and output .* Got 'output=x'"),
        (["runs.mine=[train.epochs=3]"], r"runs.mine must name a recipe"),
        (["runs.first=[recipe=second]"], r"'first' is in recipes and in runs"),
        (["recipes=[]"], r"there is nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, train: str, test: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, train, test, *arguments)


def test_each_seed_draws_labels_of_its_own_and_a_run_may_begin_from_another(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Sequence[str]] = []
    measured: list[str] = []

    def record(arguments: Sequence[str]) -> None:
        calls.append(arguments)
        pretrain(arguments)

    def evaluate(config: CompareConfig, run: Path, *, train: str) -> None:
        measured.append(train)
        (run / "eval").mkdir()
        for name in ("knn", "linear"):
            size = 16 if "alone" in run.name else 32
            protocol = {"train": train, "size": size, "own_size": size if name == "linear" else 16}
            baselines = {"raw_pixels": {"top1": 1.0}, "random": {"top1": 2.0}}
            report = {"top1": 50.0, "baselines": baselines, "protocol": protocol}
            (run / "eval" / f"{name}.json").write_text(json.dumps(report))

    monkeypatch.setattr("ssl_pipeline.commands.compare._evaluate", evaluate)
    out = tmp_path / "compared"
    settings = load(
        CompareConfig,
        [
            "runs.alone=[recipe=first]",
            'runs.after=[recipe=second, "backbone.weights={output}/alone-seed{seed}"]',
            'settings=["data.labelled.shards={labels}"]',
            *("seeds=0,1", f"draw_from={train}", "labels_per_class=2", "train={labels}", f"test={test}"),
            f"output={out}",
        ],
    )
    found = compare(settings, record)
    differ = ["size: alone-seed0 16, after-seed0 32"]  # and not train, which each seed has drawn
    assert found.protocols == {"knn": differ}, "of linear each size is the run's own"
    assert found.sizes == "Each network was measured as it was trained (size: alone-seed0 16, after-seed0 32)."
    assert f"\n{found.sizes}\n" in summary(found, 2)
    drawn = [open_shards(out / f"labels2-seed{seed}") for seed in (0, 1)]
    assert [np.bincount(np.asarray(index.labels())).tolist() for index in drawn] == [[2] * 6] * 2
    assert drawn[0].fingerprint != drawn[1].fingerprint
    assert measured == [str(out / f"labels2-seed{seed}") for seed in (0, 1)] * 2
    assert [call[1] for call in calls[:2]] == [f"data.labelled.shards={out}/labels2-seed{seed}" for seed in (0, 1)]
    assert [call[1] for call in calls[2:]] == [f"backbone.weights={out}/alone-seed{seed}" for seed in (0, 1)]
    others = settings.model_copy(update={"draw_from": test})
    with pytest.raises(
        DataError, match=rf"labels2-seed0 holds .* drawn with shards={train} .* draws with shards={test} "
    ):
        compare(others, record)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train={labels}"], r"\{labels\} needs draw_from=SHARDS and labels_per_class=N"),
        (["draw_from=x"], r"Set both"),
    ],
)
def test_labels_that_are_not_drawn_cannot_be_used(
    arguments: list[str], message: str, tmp_path: Path, train: str, test: str
) -> None:
    own = [] if arguments[0].startswith("train=") else [f"train={train}"]
    with pytest.raises(ConfigError, match=message):
        load(CompareConfig, ["recipes=first", *own, f"test={test}", f"output={tmp_path}", *arguments])

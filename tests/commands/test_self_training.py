"""eval.self_training with a stand-in for pretraining: what each round learns from, and that it goes on as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, create_backbone, save_backbone, save_classifier
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.commands.self_training import SelfTrainingConfig, main, self_training, summary
from ssl_pipeline.config import RECIPES, SELF_TRAINING, ConfigError, RunError, load, recipe_files
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.subset import open_subset, write_keep
from tests.eval.conftest import NUM_CLASSES, PREPROCESSING, TINY_VIT
from tests.runs import write_recipe
from tests.tiny import write_shards

Pretrain = Callable[[Sequence[str]], None]
RUNS = ("teacher", "small", "large")


def settings(arguments: Sequence[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments)


@pytest.fixture
def calls() -> list[dict[str, str]]:
    return []


@pytest.fixture
def pretrain(calls: list[dict[str, str]]) -> Pretrain:
    """Leaves behind what a run that classifies does, another one for each name; a run that is done stays as it is."""

    def export(arguments: Sequence[str]) -> None:
        calls.append(settings(arguments))
        output = Path(calls[-1]["output"])
        if (output / "backbone.safetensors").exists():
            return
        torch.manual_seed(RUNS.index(output.name))
        output.mkdir(parents=True)
        save_classifier(output, nn.Linear(24, NUM_CLASSES), None)
        config = BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT)
        save_backbone(output, create_backbone(config), PREPROCESSING)

    return export


def config(output: Path, train: str, test: str, *arguments: str) -> SelfTrainingConfig:
    given = [
        f"shards={train}",
        f"test={test}",
        f"output={output}",
        "labels_per_class=2",
        "teacher=[recipe=first]",
        "student=[recipe=second, train.epochs=3]",
        "students={small: [], large: [train.epochs=5]}",
        "settings=train.epochs=1,knn=null",
        "threshold=0.2",
        "workers=0",
    ]
    keys = set(settings(arguments))
    return load(SelfTrainingConfig, [*(pair for pair in given if pair.partition("=")[0] not in keys), *arguments])


def test_each_round_learns_what_the_one_before_it_says(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, calls: list[dict[str, str]]
) -> None:
    out = tmp_path / "rounds"
    rounds = self_training(config(out, train, test), pretrain)
    assert [found.name for found in rounds] == list(RUNS)
    assert [call["recipe"] for call in calls] == ["first", "second", "second"]
    assert [call["train.epochs"] for call in calls] == ["1", "3", "5"]
    assert {call["data.labelled.shards"] for call in calls} == {train}
    assert calls[0]["data.labelled.keep"] == str(out / "known.npy")
    assert "data.labelled.labels" not in calls[0]
    known = open_subset(train, keep=out / "known.npy")
    for call, name, found in zip(calls[1:], RUNS[1:], rounds[1:], strict=True):
        assert call["data.labelled.labels"] == str(out / f"{name}.npy")
        origin = json.loads((out / f"{name}.json").read_text())["origin"]
        assert origin["teacher"]["run"] == str(out / RUNS[RUNS.index(name) - 1])
        learnt = open_subset(train, keep=Path(call["data.labelled.keep"]), labels=Path(call["data.labelled.labels"]))
        assert len(learnt) == found.known + found.guessed
        assert found.known == 2 * NUM_CLASSES
        soft = open_subset(train, labels=Path(call["data.labelled.labels"])).labels()[known.in_whole_set()]
        np.testing.assert_array_equal(soft.argmax(axis=1), known.labels())
        np.testing.assert_array_equal(soft.max(axis=1), 1.0)
    assert rounds[0].guessed == 0
    assert rounds[0].known == 2 * NUM_CLASSES


def test_the_same_command_again_changes_nothing(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, calls: list[dict[str, str]]
) -> None:
    out = tmp_path / "rounds"
    first = self_training(config(out, train, test), pretrain)
    files = {path: path.read_bytes() for path in out.rglob("*.npy")}
    again = self_training(config(out, train, test), pretrain)
    assert again == first
    assert calls[:3] == calls[3:]
    assert {path: path.read_bytes() for path in out.rglob("*.npy")} == files


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, train: str, test: str, pretrain: Pretrain) -> None:
    def interrupted(arguments: Sequence[str]) -> None:
        if settings(arguments)["output"].endswith("large"):
            raise KeyboardInterrupt
        pretrain(arguments)

    out = tmp_path / "rounds"
    with pytest.raises(KeyboardInterrupt):
        self_training(config(out, train, test), interrupted)
    (out / "large.json").unlink()  # as if the labels had been half written
    assert self_training(config(out, train, test), pretrain) == self_training(
        config(tmp_path / "rounds", train, test), pretrain
    )


def test_labels_of_other_settings_are_not_taken(tmp_path: Path, train: str, test: str, pretrain: Pretrain) -> None:
    out = tmp_path / "rounds"
    self_training(config(out, train, test), pretrain)
    with pytest.raises(DataError, match=r"small\.npy was written from another teacher than .* or with other settings"):
        self_training(config(out, train, test, "threshold=0.25"), pretrain)


@pytest.mark.parametrize("changed", ["labels_per_class=1", "seed=3", "shards"])
def test_known_images_of_another_draw_are_not_taken(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, calls: list[dict[str, str]], changed: str
) -> None:
    out = tmp_path / "rounds"
    self_training(config(out, train, test), pretrain)
    before = (out / "known.npy").read_bytes()
    argument = f"shards={test}" if changed == "shards" else changed
    with pytest.raises(
        DataError, match=r"known\.npy holds .* drawn with .*labels_per_class=2, seed=0; this command"
    ) as told:
        self_training(config(out, train, test, argument), pretrain)
    assert argument in str(told.value)
    assert len(calls) == len(RUNS)
    assert (out / "known.npy").read_bytes() == before


def test_drawn_and_given_known_images_do_not_follow_each_other(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, calls: list[dict[str, str]]
) -> None:
    known = tmp_path / "mine.npy"
    write_keep(known, open_shards(train), [1, 2, 3], origin=None)
    given = ("labels_per_class=null", f"known={known}")
    self_training(config(tmp_path / "drawn", train, test), pretrain)
    with pytest.raises(DataError, match=r"known\.npy was drawn for the runs of this output, and now known=.*mine\.npy"):
        self_training(config(tmp_path / "drawn", train, test, *given), pretrain)
    self_training(config(tmp_path / "given", train, test, *given), pretrain)
    with pytest.raises(DataError, match=r"teacher has learnt .* a file known=FILE\.npy, and now labels_per_class=2"):
        self_training(config(tmp_path / "given", train, test), pretrain)
    assert len(calls) == 2 * len(RUNS)


def test_a_draw_that_was_interrupted_is_drawn_again(tmp_path: Path, train: str, test: str, pretrain: Pretrain) -> None:
    out = tmp_path / "rounds"
    out.mkdir()
    (out / "known.npy").write_bytes(b"half")
    assert self_training(config(out, train, test), pretrain)[0].known == 2 * NUM_CLASSES


def test_known_images_may_be_given(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, calls: list[dict[str, str]]
) -> None:
    known = tmp_path / "mine.npy"
    write_keep(known, open_shards(train), [1, 2, 3], origin=None)
    rounds = self_training(config(tmp_path / "out", train, test, "labels_per_class=null", f"known={known}"), pretrain)
    assert calls[0]["data.labelled.keep"] == str(known)
    assert [found.known for found in rounds] == [3, 3, 3]


def test_one_table_over_rounds(
    tmp_path: Path, train: str, test: str, pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_pipeline.commands.self_training.self_training.__defaults__", (pretrain,))
    out = tmp_path / "rounds"
    main(config(out, train, test))
    lines = (out / "self_training.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["run", lines[1].split()[0], *RUNS]
    report = json.loads((out / "self_training.json").read_text())
    assert [found["name"] for found in report["rounds"]] == list(RUNS)
    for name, found in zip(RUNS, report["rounds"], strict=True):
        of_run = json.loads((out / name / "eval" / "classifier.json").read_text())
        assert found["report"]["top1"] == of_run["top1"]
        assert f"{of_run['top1']:.2f} %" in next(line for line in lines if line.startswith(name))
    assert summary(self_training(config(out, train, test), pretrain)).splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels_per_class=null"], r"exactly one of labels_per_class=N and known=FILE\.npy"),
        (["student=[recipe=a, seed=3]"], r"small must leave seed, .* to eval\.self_training\. Got 'seed=3'"),
        (["settings=data.shards=x"], r"teacher must leave seed, .* Got 'data\.shards=x'"),
        (["student=[]"], r"small must name a recipe: \[recipe=NAME, \.\.\.\]"),
        (["students={teacher: []}"], r"students\.teacher has the name of the first run"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, train: str, test: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, train, test, *arguments)


@pytest.mark.parametrize("name", list(recipe_files(SELF_TRAINING)))
def test_each_run_of_a_recipe_has_settings_that_fit(name: str) -> None:
    found = load(SelfTrainingConfig, [f"recipe={name}"], recipes=SELF_TRAINING)
    for arguments in found.arguments().values():
        own = [f"data.shards={found.shards}", f"data.labelled.shards={found.shards}", "seed=0", "output=out"]
        run = load(PretrainConfig, [*arguments, *own], recipes=RECIPES)
        assert run.data.labelled is not None


@pytest.mark.slow
def test_real_runs_learn_from_each_other_and_go_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    short = {"steps": 2, "save_every": 1, "log_every": 1, "hang_timeout": 0, "precision": "no"}
    teacher = write_recipe(tmp_path / "teacher.yaml", "fixmatch", shards, train=short)
    student = write_recipe(tmp_path / "student.yaml", "supervised", shards, train=short)
    settings = load(
        SelfTrainingConfig,
        [
            *(f"shards={shards}", f"test={shards}", "labels_per_class=2", f"teacher=[recipe={teacher}]"),
            *(f"student=[recipe={student}]", "students={one: [], two: []}", "threshold=0", "workers=0"),
            f"output={tmp_path / 'out'}",
        ],
    )
    rounds = self_training(settings)
    assert [(found.known, found.guessed) for found in rounds] == [(6, 0), (6, 42), (6, 42)]
    assert [json.loads((tmp_path / "out" / found.name / "status.json").read_text())["state"] for found in rounds] == [
        "done"
    ] * 3
    assert self_training(settings) == rounds
    other = tmp_path / "other.npy"
    write_keep(other, open_shards(shards), [1, 2, 3, 4], origin=None)
    mine = settings.model_copy(update={"labels_per_class": None, "output": tmp_path / "mine"})
    write_keep(tmp_path / "known.npy", open_shards(shards), [0, 1, 2], origin=None)
    self_training(mine.model_copy(update={"known": tmp_path / "known.npy"}))
    with pytest.raises(RunError):  # pretraining knows its labelled images
        self_training(mine.model_copy(update={"known": other}))

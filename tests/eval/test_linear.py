import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.eval.features import passes
from ssl_pipeline.eval.linear import LinearConfig, ProbeConfig, ProbeResult, choose, linear_probe, main, sweep_table
from ssl_pipeline.eval.protocol import LabelledFeatures


def noisy(num_images: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Four overlapping classes in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 4
    return torch.eye(8)[labels] + 0.5 * torch.randn(num_images, 8, generator=generator), labels


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], config: ProbeConfig) -> ProbeResult:
    return linear_probe(LabelledFeatures(*train, *test, num_classes=4), config)[0]


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_the_probe_is_far_above_chance(solver: str) -> None:
    result = probe(noisy(200, seed=0), noisy(100, seed=1), ProbeConfig(solver=solver, epochs=30))
    assert result.top1 > 70.0
    assert result.top5 == 100.0
    assert result.solver == solver


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_the_choice_never_sees_the_test_labels(solver: str) -> None:
    train, (test, test_labels) = noisy(200, seed=0), noisy(100, seed=1)
    config = ProbeConfig(solver=solver, epochs=10)
    first = probe(train, (test, test_labels), config)
    wrong = probe(train, (test, (test_labels + 1) % 4), config)
    assert wrong.chosen == first.chosen
    assert wrong.sweep == first.sweep
    assert wrong.top1 < first.top1


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_the_choice_never_sees_the_test_images(solver: str) -> None:
    train, (test, test_labels) = noisy(200, seed=0), noisy(100, seed=1)
    config = ProbeConfig(solver=solver, epochs=10)
    first = probe(train, (test, test_labels), config)
    other = probe(train, (100 * test.flip(1), test_labels), config)
    assert (other.chosen, other.sweep) == (first.chosen, first.sweep)


def test_the_chosen_setting_is_the_best_of_the_sweep() -> None:
    config = ProbeConfig(solver="sgd", learning_rates=(1e-6, 1.0), weight_decays=(0.0, 1e6), epochs=10)
    result = probe(noisy(200, seed=0), noisy(100, seed=1), config)
    assert result.chosen == {"learning_rate": 1.0, "weight_decay": 0.0}
    assert len(result.sweep) == 4
    assert result.validation_top1 == max(setting["validation_top1"] for setting in result.sweep)


@pytest.mark.parametrize(
    ("solver", "middle"), [("logistic", {"inverse_penalty": 1.0}), ("sgd", {"learning_rate": 0.5})]
)
def test_with_one_image_of_each_class_the_middle_setting_is_taken(capsys, solver, middle) -> None:
    train, labels = noisy(200, seed=0)
    first = [int((labels == label).nonzero()[0]) for label in range(4)]
    result = probe((train[first], labels[first]), noisy(100, seed=1), ProbeConfig(solver=solver, epochs=10))
    assert result.chosen.items() >= middle.items()
    assert math.isnan(result.validation_top1)
    assert all(line.split()[-1] == "-" for line in sweep_table(result).splitlines()[2:])
    assert "so no setting could be chosen" in capsys.readouterr().err


def test_classes_of_one_image_among_others_are_counted(capsys) -> None:
    train, labels = noisy(200, seed=0)
    first = [int((labels == label).nonzero()[0]) for label in range(1, 4)] + (labels == 0).nonzero().flatten().tolist()
    probe((train[first], labels[first]), noisy(100, seed=1), ProbeConfig(solver="logistic"))
    assert "3 classes have one training image: the settings are chosen on images of" in capsys.readouterr().err


def test_every_rate_of_a_sweep_is_measured_as_if_alone() -> None:
    rates = tuple(0.001 * 2.0**power for power in range(16))
    train, test = noisy(120, seed=0), noisy(40, seed=1)
    train, test = (train[0].double(), train[1]), (test[0].double(), test[1])

    def sweep(*learning_rates: float) -> ProbeResult:
        return probe(
            train, test, ProbeConfig(solver="sgd", learning_rates=learning_rates, weight_decays=(0.0,), epochs=5)
        )

    together = sweep(*rates)
    alone = [sweep(rate) for rate in rates]
    assert together.sweep == [one.sweep[0] for one in alone]
    best = alone[rates.index(together.chosen["learning_rate"])]
    assert (together.top1, together.top5) == (best.top1, best.top5)


def test_the_table_has_every_setting_and_marks_the_chosen_one() -> None:
    config = ProbeConfig(solver="sgd", learning_rates=(1e-6, 1.0), weight_decays=(0.0, 0.5), epochs=5)
    result = probe(noisy(200, seed=0), noisy(40, seed=1), config)
    lines = sweep_table(result).splitlines()
    assert lines[0].strip().startswith("learning rate / weight decay  validation top-1")
    settings = [line.lstrip("* ").rsplit(maxsplit=2)[0] for line in lines[2:]]
    assert settings == ["1e-06 / 0", "1e-06 / 0.5", "1 / 0", "1 / 0.5"]
    chosen = f"* 1 / {result.chosen['weight_decay']:g} "
    assert [line for line in lines if line.startswith("*")] == [line for line in lines if line.startswith(chosen)]
    assert sum(line.startswith("*") for line in lines) == 1


def test_equal_accuracies_are_decided_by_the_loss_and_diverged_settings_come_last() -> None:
    labels = torch.tensor([0, 1])
    unsure, sure = torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    diverged = torch.full((2, 2), torch.nan)
    best, accuracies = choose([diverged, unsure, sure], labels)
    assert (best, accuracies) == (2, [0.0, 100.0, 100.0])
    with pytest.raises(ConfigError, match=r"diverged \(1 tried\)"):
        choose([diverged], labels)


def test_the_solver_follows_the_size_of_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.eval.linear.LARGEST_LOGISTIC", 100 * noisy(1, seed=0)[0].shape[1])
    config = ProbeConfig(epochs=2)
    solvers = [probe(noisy(size, seed=0), noisy(10, seed=1), config).solver for size in (100, 101)]
    assert solvers == ["logistic", "sgd"]


def test_a_network_and_its_baselines_have_one_solver(
    run: Path, train: str, test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_pipeline.eval.linear.LARGEST_LOGISTIC", 72 * 24)  # the network's features, not the pixels
    arguments = [f"run={run}", f"train={train}", f"test={test}", "epochs=2"]
    for more, expected in ((["baselines=true"], "sgd"), ([], "logistic")):
        assert linear(*arguments, *more) == 0
        report = json.loads((run / "eval" / "linear.json").read_text())
        assert report["protocol"]["solver"] == report["solver"] == expected
        assert {baseline["solver"] for baseline in report["baselines"].values()} <= {expected}


def test_features_that_are_not_finite_are_refused() -> None:
    features, labels = noisy(40, seed=0)
    features[3, 2] = torch.inf
    with pytest.raises(ConfigError, match="finite features"):
        probe((features, labels), noisy(10, seed=1), ProbeConfig())


def test_one_class_is_refused() -> None:
    features, labels = noisy(40, seed=0)
    with pytest.raises(ConfigError, match="two classes or more"):
        probe((features, 0 * labels), noisy(10, seed=1), ProbeConfig())


def linear(*arguments: str) -> int:
    return run_command(LinearConfig, main, command="python -m eval.linear", argv=["workers=0", *arguments])


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_a_run_is_probed_and_reported(
    solver: str, run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        linear(
            f"run={run}",
            f"train={train}",
            f"test={test}",
            f"solver={solver}",
            "baselines=true",
            "epochs=20",
            "sgd_batch_size=16",
        )
        == 0
    )
    report = json.loads((run / "eval" / "linear.json").read_text())
    assert 0.0 <= report["top1"] <= report["top5"] <= 100.0
    assert set(report["baselines"]) == {"raw_pixels", "random"}
    assert report["baselines"]["raw_pixels"]["top1"] > 80.0  # the classes are colours
    protocol = report["protocol"]
    assert protocol["solver"] == solver
    assert "retrained on all" in protocol["selection"]
    assert protocol["num_train"] == 72
    assert protocol["subject"]["weights"].startswith("the run's evaluated backbone")
    printed = capsys.readouterr().out
    for words in ("raw pixels", "random initialisation", "pretrained", "validation top-1"):
        assert words in printed


@pytest.mark.other
def test_knn_and_linear_share_their_features(run: Path, train: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_pipeline.eval.knn import KnnConfig
    from ssl_pipeline.eval.knn import main as knn_main

    arguments = [f"run={run}", f"train={train}", f"test={test}", "baselines=true"]
    assert run_command(KnnConfig, knn_main, command="", argv=arguments) == 0
    extracted = []
    monkeypatch.setattr(passes, "forward_passes", lambda *_, **__: extracted.append(1))
    assert linear(*arguments) == 0
    assert extracted == []


def test_missing_labels_name_the_shards(
    train: str, write_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = write_shards(tmp_path / "unlabelled", [0, None])
    assert linear("backbone=raw_pixels", f"train={unlabelled}", f"test={train}") == 2
    assert f"{unlabelled} has labels for 1 of 2 images; the linear probe needs them" in capsys.readouterr().err


def test_a_run_that_has_not_ended_says_what_to_do(
    train: str, test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linear(f"run={tmp_path}", f"train={train}", f"test={test}") == 2
    error = capsys.readouterr().err
    assert f"run={tmp_path} has no backbone.safetensors" in error
    assert "accelerate launch pretrain.py" in error

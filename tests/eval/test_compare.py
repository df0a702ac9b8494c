"""eval.compare with a stand-in for pretraining: a run that appears as an exported backbone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eval.compare import CompareConfig, compare, summary
from ssl_pipeline.config import ConfigError, load

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
    paths = (f"train={train}", f"test={test}", f"output={output}")
    return load(CompareConfig, ["recipes=first,second", "seeds=0,1", "k=3", *paths, *arguments])


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
        [f"recipe={recipe}", f"seed={seed}", f"output={out / f'{recipe}-seed{seed}'}", "train.epochs=1", "knn=null"]
        for recipe in ("first", "second")
        for seed in (0, 1)
    ]
    for recipe in ("first", "second"):
        for evaluator in ("knn", "linear"):
            assert {subject: len(values) for subject, values in found[recipe][evaluator].items()} == {
                "raw_pixels": 2,
                "random": 2,
                "pretrained": 2,
            }
            assert (out / f"{recipe}-seed1" / "eval" / f"{evaluator}.json").is_file()


def test_the_table_has_mean_and_spread_over_seeds() -> None:
    scores = {"raw_pixels": [50.0, 50.0], "random": [10.0, 20.0], "pretrained": [70.0, 80.0]}
    text = summary({"mine": {"knn": scores, "linear": scores}}, 2)
    assert "15.00 % +- 7.07" in text
    assert "75.00 % +- 7.07" in text
    assert "never of the best one; mean +- standard deviation over 2 seeds" in text


def test_settings_may_not_name_the_seed(tmp_path: Path, train: str, test: str, pretrain: Pretrain) -> None:
    with pytest.raises(ConfigError, match=r"settings must leave recipe, seed and output .* Got 'seed=3'"):
        compare(config(tmp_path, train, test, "settings=seed=3"), pretrain)

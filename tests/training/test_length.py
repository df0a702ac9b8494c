"""How long a run is: a length on the command line replaces the recipe's, and what lasts longer is said."""

import pytest

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.schedule import Progress


def settings(*argv: str, recipe: str = "digits_dino") -> PretrainConfig:
    return load(PretrainConfig, [f"recipe={recipe}", *argv], recipes=RECIPES)


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        ((), (100, None)),
        (("train.steps=7",), (None, 7)),
        (("train.epochs=2",), (2, None)),
        (("train.steps=7", "train.epochs=null"), (None, 7)),
        (("train.epochs=null", "train.steps=7"), (None, 7)),
        (("train={steps: 7, log_every: 1}",), (None, 7)),
    ],
)
def test_a_length_on_the_command_line_replaces_the_recipes(argv, length):
    train = settings(*argv, recipe="dino_vits16").train
    assert (train.epochs, train.steps) == length
    assert train.precision == "bf16"  # nothing else of the recipe is touched


def test_a_recipe_in_steps_is_replaced_as_well(tmp_path):
    path = tmp_path / "short.yaml"
    text = (RECIPES / "imagenet/dino_vits16.yaml").read_text()
    path.write_text(text.replace("epochs: 100", "steps: 500"))
    train = settings("train.epochs=3", recipe=str(path)).train
    assert (train.epochs, train.steps) == (3, None)


@pytest.mark.parametrize("argv", [("train.steps=7", "train.epochs=2"), ("train={epochs: 2, steps: 7}",)])
def test_two_lengths_on_the_command_line_are_refused(argv):
    with pytest.raises(ConfigError, match=r"^train: set either epochs or steps\. Got both\.$"):
        settings(*argv)


def test_shares_of_the_run_follow_its_length():
    lr = settings("train.steps=40", "optim.lr={value: 1, warmup: '25%', final: 0}").optim.lr
    for total in (40, 400):
        assert lr(Progress(total // 4, total, 10)) == 1
        assert lr(Progress(total // 8, total, 10)) == pytest.approx(0.5)
        assert lr(Progress(total, total, 10)) == pytest.approx(0)

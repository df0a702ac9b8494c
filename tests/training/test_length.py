"""How long a run is: a length on the command line replaces the recipe's, and what lasts longer is said."""

import pytest

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load, recipe_files
from ssl_pipeline.schedule import Progress
from ssl_pipeline.training.clock import Clock
from ssl_pipeline.training.remarks import remarks


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


def said(*argv: str, recipe: str = "digits_dino", images: int = 1000) -> list[str]:
    """What is said of settings that begin with global batches of 100."""
    config = settings(*argv, recipe=recipe)
    end = config.train.steps * 100 if config.train.steps is not None else int(config.train.epochs * images)
    return remarks(config.method, config.optim, config.augment, Clock(images, 100, end))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ("optim.lr={value: 0.5, warmup: 3ep}",),
            "optim.lr.warmup=3ep is 30 steps, but the run ends after 20: 0.5 is never reached.",
        ),
        (
            ("optim.lr={value: 0.5, warmup: 0, delay: 2ep}",),
            "optim.lr.delay=2ep is 20 steps, but the run ends after 20: 0.5 is never reached.",
        ),
        (
            ("optim.lr={value: 0.5, final: 0, warmup: 5, decay_for: 16}",),
            "optim.lr.decay_for=16 ends at step 21, but the run ends after 20: its last value is never reached.",
        ),
        (
            ("optim.weight_decay={value: 0.5, final: null, decay: steps, milestones: ['50%', 25]}",),
            "optim.weight_decay.milestones=25 is 25 steps, but the run ends after 20.",
        ),
        (
            ("method.freeze_prototypes_for=2ep",),
            "method.freeze_prototypes_for=2ep is 20 steps, but the run ends after 20.",
        ),
        (
            ("method.teacher_momentum={value: 0.9, warmup: 30, start: 0.5}",),
            "method.teacher_momentum.warmup=30 is 30 steps, but the run ends after 20: 0.9 is never reached.",
        ),
        (
            ("optim.lr={value: 0.5, warmup: 5, start: 0.6}",),
            "optim.lr.start=0.6 is above the effective learning rate 0.5 that the warm-up leads to.",
        ),
        (
            ("optim.lr={value: 0.5, final: 0.6}",),
            "optim.lr.final=0.6 is above the effective learning rate 0.5 that the decay comes from.",
        ),
        (
            ("augment.local.size=48",),
            "augment.local.size=48 is larger than augment.global.size=24: local crops are the small ones.",
        ),
    ],
)
def test_what_does_not_fit_into_the_run_is_said(argv, sentence):
    quiet = ("train.steps=20", "optim.lr_reference_batch=null", "optim.lr=0.5", "optim.weight_decay=0.1")
    short = [key for key in quiet if key.partition("=")[0] not in {given.partition("=")[0] for given in argv}]
    quiet_method = ["method.freeze_prototypes_for=1"] if "method.freeze" not in argv[0] else []
    views = ["augment.global.size=24"] if "augment" in argv[0] else []
    assert said(*short, *quiet_method, *views, *argv) == [sentence]


def test_the_scaled_learning_rate_is_what_the_start_is_compared_with():
    argv = ("optim.lr={value: 0.4, warmup: 5, start: 0.2}", "optim.lr_reference_batch=400", "optim.weight_decay=0")
    assert said("train.steps=200", *argv) == [
        "optim.lr.start=0.2 is above the effective learning rate 0.1 that the warm-up leads to."
    ]


@pytest.mark.parametrize("recipe", sorted(recipe_files(RECIPES)))
def test_nothing_is_said_of_the_recipes(recipe):
    assert said(recipe=recipe, images=50_000 if "cifar" in recipe or "digits" in recipe else 1_281_167) == []


def test_an_inclusive_warm_up_reaches_its_value_in_its_last_step():
    warmup = "optim.lr={value: 0.5, warmup: 20, inclusive: true}"
    argv = ("train.steps=20", "optim.lr_reference_batch=null", "optim.weight_decay=0", "method.freeze_prototypes_for=0")
    assert said(*argv, warmup) == []

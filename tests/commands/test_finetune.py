"""`finetune.py`: what its keys stand for, and a run from the weights of another to a measured classifier."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_classifier, save_backbone
from ssl_pipeline.commands import finetuning
from ssl_pipeline.commands.finetune import command as front
from ssl_pipeline.commands.finetune import how_to_begin
from ssl_pipeline.commands.finetuning import FinetuneConfig, expand
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.config.arguments import keys_of
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.subset import write_labels
from ssl_pipeline.eval import table
from ssl_pipeline.eval.classifier import ClassifierConfig, evaluate_classifier
from tests.ranks import start, start_ranks
from tests.runs import SGD, Happening, command, equal, final_state, losses, rows, trained, write_recipe
from tests.tiny import CNN, VIT, write_shards

SHORT = ["train.steps=6", "train.log_every=1", "data.batch_size=8", "data.workers=0", "train.hang_timeout=0"]


def settings(*arguments: str) -> FinetuneConfig:
    return load(FinetuneConfig, expand(arguments), recipes=RECIPES)


def save_run(folder: Path, config: BackboneConfig = VIT, size: int = 16) -> Path:
    """What a finished run leaves of its backbone."""
    torch.manual_seed(3)
    save_backbone(folder, create_backbone(config), Preprocessing(size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), step=5)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return write_shards(folder / "train"), write_shards(folder / "test", (9,))


def test_weights_of_a_run_bring_their_network_size_and_colours(tmp_path):
    run = save_run(tmp_path / "mine")
    config = settings(f"weights={run}", "train=data/a", "test=data/b.tar")
    assert config.recipe == "finetune_vit_small"
    assert config.method.name == "supervised"
    assert (config.backbone.name, config.backbone.arguments) == (VIT.name, VIT.arguments)
    assert (config.backbone.weights, config.backbone.drop_path) == (str(run), 0.1)
    assert (config.augment["view"].size, config.data.mean, config.data.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


DEEP = VIT.model_copy(update={"arguments": VIT.arguments | {"depth": 5}})


@pytest.mark.parametrize(
    ("network", "given", "class_tokens", "patch_mean"),
    [
        (DEEP, [], 4, False),  # the recipe's protocol, whatever the run's own features are
        (DEEP, ["backbone.class_tokens=1", "backbone.patch_mean=true"], 1, True),
        (DEEP.model_copy(update={"class_tokens": 2}), [], 2, False),  # a run whose features are several tokens already
        (DEEP.model_copy(update={"arguments": DEEP.arguments | {"depth": 2}}), [], 0, False),  # too few blocks
        (CNN, [], 0, False),
    ],
)
def test_a_linear_protocol_reads_the_class_tokens_that_it_is_defined_by(
    tmp_path, network, given, class_tokens, patch_mean
):
    run = save_run(tmp_path / "mine", network)
    config = settings("recipe=linear_dino_vits16", f"weights={run}", "train=data/a.tar", *given)
    assert (config.backbone.class_tokens, config.backbone.patch_mean) == (class_tokens, patch_mean)
    assert config.backbone.name == network.name


def test_a_cnn_takes_the_recipe_for_cnns_and_keeps_its_statistics(tmp_path, capsys):
    config = settings(f"weights={save_run(tmp_path / 'mine', CNN)}", "train=data/a.tar")
    assert config.recipe == "finetune_cnn_small"
    assert (config.backbone.frozen_batch_norm, config.backbone.small_images) == (True, True)
    assert config.run_directory == Path("runs/mine_finetune_cnn_small")
    assert "frozen_batch_norm" not in capsys.readouterr().err  # it is not dropped, so nothing says so


def test_a_tag_brings_its_network_too():
    config = settings("weights=vit_tiny_patch16_224.augreg_in21k", "train=data/a.tar", "test=data/b.tar")
    assert (config.backbone.name, config.backbone.weights) == ("vit_tiny_patch16_224", "augreg_in21k")
    assert (config.data.mean, config.augment["view"].size) == ((0.5, 0.5, 0.5), 224)
    assert (config.data.shards, config.classifier.val) == ("data/a.tar", "data/b.tar")
    assert config.run_directory == Path("runs/vit_tiny_patch16_224_finetune_vit_small")


def test_what_is_given_stays(tmp_path):
    run = save_run(tmp_path / "mine")
    given = [
        "augment.view.size=8",
        "data.mean=[0.5,0.5,0.5]",
        "backbone.drop_path=0.3",
        "recipe=feature_extraction_small",
    ]
    config = settings(f"weights={run}", "train=data/a.tar", "output=out", *given)
    assert (config.augment["view"].size, config.data.mean, config.backbone.drop_path) == (8, (0.5, 0.5, 0.5), 0.3)
    assert (config.recipe, config.run_directory, config.method.frozen_backbone) == (
        "feature_extraction_small",
        Path("out"),
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train=a.tar"], "weights= is missing"),
        (["weights=resnet18.a1_in1k"], "train= is missing"),
        (["weights=resnet19.a1_in1k", "train=a.tar"], "^No timm model 'resnet19'.* Did you mean 'resnet"),
        (["weights=x.safetensors", "train=a.tar"], r"^weights=x\.safetensors does not exist"),
        (["weights=a.pth", "backbone.weights=b.pth"], "weights= stands for backbone.weights=. Give one of the two."),
        (["weights=no_such_tag", "train=a.tar"], "It is not known which network the weights no_such_tag belong to"),
    ],
)
def test_what_is_missing_is_told(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        expand(arguments)


def test_the_commands_that_it_shows_are_commands():
    for line in how_to_begin("finetune.py").splitlines():
        if line.startswith("  "):
            keys_of(line.split()[2:])


def test_the_front_knows_its_keys_and_tells_typos_before_torch(monkeypatch, capsys):
    reached = []
    monkeypatch.setattr(finetuning, "main", lambda name: reached.append(name) or 0)
    given = ["weights=runs/mine", "train=data/a", "test=data/b", "train.epochs=3", "method.layer_decay=0.5"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given])
    assert front() == 0
    assert reached == ["finetune.py"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given, "wieghts=runs/mine"])
    assert front() == 2
    assert "Unknown key 'wieghts'" in capsys.readouterr().err


def finetune(argv: list[str]) -> int:
    sys.argv[1:] = argv
    return finetuning.main("finetune.py")


def arguments(run: Path, shards: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [f"weights={run}", f"train={shards[0]}", f"test={shards[1]}", f"output={output}", *SHORT, *more]


def test_folders_of_images_are_packed_into_the_run(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / "photos" / name / "1.png")
    run, photos = save_run(tmp_path / "mine"), tmp_path / "photos"
    config = settings(f"weights={run}", f"train={photos}", f"test={photos}", f"output={tmp_path / 'out'}")
    assert (config.data.shards, config.classifier.val) == (f"{tmp_path}/out/images", f"{tmp_path}/out/test/images")
    with pytest.raises(ConfigError, match=r"^test=nowhere does not exist\. Needed: an image, a folder or a zip"):
        settings(f"weights={run}", f"train={photos}", "test=nowhere", f"output={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()
    Image.new("RGB", (9, 7)).save(photos / "1.png")  # another folder than was meant: no run has begun on it
    settings(f"weights={run}", f"train={photos}", f"test={photos}", f"output={tmp_path / 'out'}")
    (tmp_path / "out" / "config.yaml").touch()
    (photos / "1.png").unlink()
    with pytest.raises(DataError, match="has changed since it was packed"):
        settings(f"weights={run}", f"train={photos}", f"test={photos}", f"output={tmp_path / 'out'}")
    assert list(open_shards(config.classifier.val).class_names) == ["cat", "dog"]


def test_nothing_is_packed_where_settings_are_shown_or_wrong(tmp_path, capsys):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 7)).save(tmp_path / "photos" / "cat" / "1.png")
    argv = [f"weights={save_run(tmp_path / 'mine')}", f"train={tmp_path / 'photos'}", f"output={tmp_path / 'out'}"]
    assert finetune([*argv, "--print"]) == 0
    assert f"shards: {tmp_path}/out/images" in capsys.readouterr().out
    assert finetune([*argv, "train.epochs=many"]) == 2
    assert "train.epochs" in capsys.readouterr().err
    assert finetune([*argv, "backbone.name=resnet18"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.ddp
def test_a_run_is_fine_tuned_and_measured(tmp_path, shards):
    run, output = save_run(tmp_path / "mine"), tmp_path / "tuned"
    assert start(finetune, arguments(run, shards, output)).result() == 0
    report = json.loads((output / "eval" / "classifier.json").read_text())
    last = rows(output)[-1]
    assert last["step"] == 6
    assert report["top1"] == pytest.approx(last["classifier_top1"])  # the monitor's, on the same images
    assert sum(row["images"] for row in report["by_class"]["per_class"]) == 9
    assert report["protocol"]["train"] == str(shards[0])
    head, _ = load_classifier(output)
    assert head.out_features == 3
    reports = table.read_run(output)
    top1 = table.top1_of(reports, output)
    assert top1["classifier"]["pretrained"] == report["top1"]
    text = table.summary(top1, table.titles_of(reports), table.reported_model(reports, output))
    assert "classifier top-1" in text.splitlines()[0]
    assert "baselines" not in text
    again = evaluate_classifier(ClassifierConfig(run=output, test=str(shards[1]), workers=0))
    assert again["top1"] == report["top1"]
    by_step = evaluate_classifier(ClassifierConfig(run=output, test=str(shards[1]), workers=0, step=6))
    assert by_step["top1"] == report["top1"]


# The engine


def recipe_of(path: Path, shards: Path, **train: object) -> str:
    """Fine-tuning in its smallest form, with all that draws numbers."""
    method = {
        "name": "supervised",
        "learns_from": "all",
        "label_smoothing": 0.1,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "mixing_share": 0.7,
        "layer_decay": 0.7,
        "unfreeze_every": 2,
        "teacher_momentum": {"value": 0.0},
    }
    view = {"count": 1, "size": 16, "rand_augment": 2, "jitter_prob": 0.0, "gray_prob": 0.0}
    sections = {
        "method": method,
        "augment": {"view": view},
        "data": {"shards": str(shards), "batch_size": 8, "workers": 0},
        "optim": SGD,
        "train": {"steps": 8, "save_every": 3, "log_every": 1, "hang_timeout": 0, **train},
    }
    return f"recipe={write_recipe(path, 'supervised', shards, **sections)}"


@pytest.mark.ddp
def test_two_processes_fine_tune_as_one(tmp_path, shards):
    recipe = recipe_of(tmp_path / "recipe.yaml", shards[0], sync_batch_norm=True)
    happening = Happening(float64=True)
    alone = start(trained, [recipe, f"output={tmp_path / 'alone'}"], happening)
    together = [recipe, f"output={tmp_path / 'together'}", "data.batch_size=4"]
    first, second = (child.result() for child in start_ranks(trained, together, happening))
    assert equal(first, second)
    torch.testing.assert_close(first, alone.result(), rtol=0, atol=1e-8)
    assert dict(losses(tmp_path / "together")) == pytest.approx(dict(losses(tmp_path / "alone")), rel=1e-5)


@pytest.mark.ddp
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, shards):
    recipe = recipe_of(tmp_path / "recipe.yaml", shards[0])
    assert start(command, [recipe, f"output={tmp_path / 'whole'}"]).wait() == 0
    argv = [recipe, f"output={tmp_path / 'stopped'}"]
    assert start(command, argv, Happening("SIGTERM", at=4)).wait() == 128 + 15
    assert start(command, argv).wait() == 0
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


@pytest.mark.ddp
def test_a_frozen_backbone_comes_out_as_it_went_in(tmp_path, shards):
    run = save_run(tmp_path / "mine")
    argv = arguments(run, shards, tmp_path / "tuned", "recipe=feature_extraction_small")
    assert start(finetune, argv).result() == 0
    before, after = (load_file(place / "backbone.safetensors") for place in (run, tmp_path / "tuned"))
    assert equal(before, after)
    assert load_classifier(tmp_path / "tuned")[0].weight.any()


@pytest.mark.ddp
def test_images_that_the_method_does_not_use_are_not_read(tmp_path, shards):
    broken = write_shards(tmp_path / "broken", (20, 12), corrupt=tuple(range(32)))
    recipe = write_recipe(tmp_path / "recipe.yaml", "supervised", shards[0])
    argv = [f"recipe={recipe}", f"data.shards={broken}", "train.steps=5", f"output={tmp_path / 'run'}"]
    assert start(command, argv).wait() == 0
    assert rows(tmp_path / "run")[-1]["epoch"] == pytest.approx(5 * 8 / 32)


@pytest.mark.ddp
def test_images_without_a_label_are_refused_where_all_are_learnt(tmp_path, shards):
    half = tmp_path / "labels.npy"
    index = open_shards(shards[0])
    labels = index.labels().copy()
    labels[3:] = -1
    write_labels(half, index, labels, class_names=None, origin="a test")
    child = start(
        command, [recipe_of(tmp_path / "recipe.yaml", shards[0]), f"output={tmp_path}/run", f"data.labels={half}"]
    )
    assert child.wait() == 2
    assert f"Supervised learns the labels of all images, but {shards[0]} has some without one" in child.printed()

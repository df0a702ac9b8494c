"""Another backbone, method or optimizer on the command line: what of the recipe goes, and what is said of it."""

from __future__ import annotations

import pytest

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from tests.tiny import write_shards


def recipe(name, *argv):
    return load(PretrainConfig, [f"recipe={name}", *argv], recipes=RECIPES)


def test_another_backbone_drops_the_settings_of_the_old_one_and_says_so(capsys):
    backbone = recipe("mae_vitb16", "backbone.name=vit_tiny_patch16_224", "backbone.arguments.img_size=32").backbone
    assert backbone.model_dump(exclude_defaults=True) == {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32}}
    assert capsys.readouterr().err == (
        "note: backbone.name=vit_tiny_patch16_224 replaces vit_base_patch16_224 and what the recipe says of it "
        "(initial_weights=mae, fixed_positions=true). Set backbone.KEY to keep one.\n"
    )


@pytest.mark.parametrize("argument", ["backbone.name=resnet34", "backbone={name: resnet34}"])
def test_the_arguments_go_and_the_stem_for_small_images_stays_with_a_resnet(argument):
    backbone = recipe("cifar10_byol_resnet18", argument).backbone
    assert (backbone.name, backbone.arguments, backbone.small_images) == ("resnet34", {}, True)


def test_the_stem_for_small_images_goes_where_there_is_none():
    argv = ["backbone.name=vit_tiny_patch16_224", "backbone.arguments={img_size: 32, patch_size: 4}"]
    backbone = recipe("cifar10_byol_resnet18", *argv).backbone
    assert (backbone.small_images, backbone.arguments) == (False, {"img_size": 32, "patch_size": 4})


def test_the_order_of_the_arguments_does_not_matter():
    argv = ["backbone.arguments.img_size=32", "backbone.drop_path=0.2", "backbone.name=vit_tiny_patch16_224"]
    assert recipe("dino_vits16", *argv).backbone == recipe("dino_vits16", *reversed(argv)).backbone
    assert recipe("dino_vits16", *argv).backbone.drop_path == 0.2


def test_the_same_name_drops_nothing(capsys):
    config = recipe("cifar10_byol_resnet18")
    assert recipe("cifar10_byol_resnet18", "backbone.name=resnet18", "method.name=byol", "optim.name=sgd") == config
    assert "note" not in capsys.readouterr().err


def test_another_method_begins_with_its_own_defaults(capsys):
    config = recipe("cifar10_byol_resnet18", "method.name=simclr", "method.temperature=0.5")
    assert config.method.model_dump(exclude_defaults=True) == {"name": "simclr", "temperature": 0.5}
    assert "note: method.name=simclr replaces byol and what the recipe says of it (" in capsys.readouterr().err


def test_another_optimizer_drops_what_the_old_one_alone_has():
    optim = recipe("mae_vitb16", "optim.name=sgd").optim
    assert optim.betas == (0.9, 0.999)
    assert (optim.lr.value, optim.lr.warmup) == (1.5e-4, "40ep")


def test_an_unknown_name_is_told_as_before():
    with pytest.raises(ConfigError, match=r"^method\.name must be one of .* Did you mean 'simclr'\?"):
        recipe("cifar10_byol_resnet18", "method.name=simclrr")


def test_a_mapping_of_free_keys_is_replaced_and_a_section_is_not():
    assert recipe("cifar10_dino_vit_tiny", "backbone.arguments={}").backbone.arguments == {}
    assert recipe("cifar10_dino_vit_tiny", "backbone.arguments={img_size: 64}").backbone.arguments == {"img_size": 64}
    assert recipe("cifar10_dino_vit_tiny", "optim.lr={value: 1e-3}").optim.lr.final == 1e-6


def test_null_leaves_an_argument_out_whether_it_is_there_or_not():
    config = recipe("cifar10_dino_vit_tiny", "backbone.arguments.img_size=null", "backbone.arguments.depth=null")
    assert config.backbone.arguments == {"patch_size": 4}
    argv = ["backbone.name=resnet18", "backbone.arguments.img_size=null"]
    assert recipe("cifar10_dino_vit_tiny", *argv).backbone.arguments == {}


# own images, and the labelled images of the recipe


@pytest.mark.parametrize(
    ("name", "monitor", "key"),
    [("dino_vits16", "knn", "knn.train"), ("cifar10_fixmatch_wrn28_2", "classifier", "classifier.val")],
)
def test_a_monitor_of_images_that_are_not_there_is_left_out_with_one_line(
    capsys, monkeypatch, tmp_path, name, monitor, key
):
    monkeypatch.chdir(tmp_path)
    config = recipe(name, "data.shards=mine", f"{monitor}.every=1ep")
    assert getattr(config, monitor) is None
    lines = [line for line in capsys.readouterr().err.splitlines() if f" {key}=" in line]
    assert len(lines) == 1
    assert f"does not exist, so this run goes on without {monitor}. Set {key}" in lines[0]


@pytest.mark.parametrize("argument", ["knn.train=typed", "knn={every: 1ep, train: typed, val: typed}", "seed=1"])
def test_paths_that_were_typed_and_recipes_as_they_are_keep_their_monitor(monkeypatch, tmp_path, argument):
    monkeypatch.chdir(tmp_path)
    own = ["data.shards=mine"] if argument != "seed=1" else []
    assert recipe("dino_vits16", *own, argument).knn is not None


def test_images_of_the_recipe_that_are_there_keep_their_monitor(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data/imagenet/train-10pct")
    write_shards(tmp_path / "data/imagenet/val")
    assert recipe("dino_vits16", "data.shards=mine").knn is not None
    assert "note" not in capsys.readouterr().err

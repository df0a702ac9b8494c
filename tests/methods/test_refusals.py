"""What a run is refused for before its first step, and in which words."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.batch import RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.data.stream import DataConfig, LabelledConfig
from ssl_pipeline.training.preflight import check_recipe
from tests.tiny import CNN, CONFIGS, VIT, make_method, needs, view_shape, write_shards

WIDTHS = {
    "cifar10_byol_resnet18": ["projector_hidden_dim", "projector_dim", "predictor_hidden_dim"],
    "cifar10_moco_resnet18": ["projector_hidden_dim", "projector_dim"],
    "cifar10_simsiam_resnet18": ["projector_hidden_dim", "projector_dim", "predictor_hidden_dim"],
    "mae_vitb16": ["decoder_dim"],
}


def refusal(folder, recipe, *settings, batch_size=8):
    """What the command prints after `error: `; no step is made, and no weight saved."""
    shards = write_shards(folder / "shards")
    small = [f"method.{width}=16" for width in WIDTHS[recipe]]
    run = [f"data.shards={shards}", "data.workers=0", f"output={folder / 'run'}", "knn=null"]
    run += [f"data.batch_size={batch_size}", "train.precision=no", "train.steps=1"]
    config = load(PretrainConfig, [f"recipe={recipe}", *run, *small, *settings], recipes=RECIPES)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ConfigError) as error:
            pretrain(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (folder / "run" / "checkpoints").exists()
    return str(error.value)


def test_a_queue_that_the_global_batch_does_not_divide(tmp_path):
    sentence = refusal(tmp_path, "cifar10_moco_resnet18", "train.accumulate=3")
    assert sentence == (
        "method.queue_size must be a multiple of the 48 keys that a step brings (global batch 24). Got 4096; try 4080."
    )


@pytest.mark.parametrize("recipe", ["cifar10_byol_resnet18", "cifar10_moco_resnet18", "cifar10_simsiam_resnet18"])
def test_batch_norm_over_a_single_image(tmp_path, recipe):
    sentence = refusal(tmp_path, recipe, "train.accumulate=4", batch_size=1)
    assert "with resnet18 has batch norm, which needs more than one image. Got data.batch_size=1" in sentence


def test_mae_on_a_cnn(tmp_path):
    settings = ["backbone.name=resnet18", "backbone.initial_weights=null", "backbone.fixed_positions=false"]
    sentence = refusal(tmp_path, "mae_vitb16", *settings)
    assert sentence.startswith(
        "MAE needs a backbone with patch tokens (a ViT). 'resnet18' has none. Networks that have"
    )


def test_mae_on_a_cnn_with_the_weights_that_its_recipe_begins_with(tmp_path):
    sentence = refusal(tmp_path, "mae_vitb16", "backbone.name=resnet18")
    assert sentence == (
        "MAE needs a backbone with patch tokens (a ViT), and so does backbone.initial_weights=mae. 'resnet18' has none."
    )


def test_local_crops_for_a_method_without_them(tmp_path):
    sentence = refusal(tmp_path, "cifar10_byol_resnet18", "augment.local={count: 2, size: 16}")
    assert sentence == "BYOL does not use the view group augment.local. It reads view."


def check(name, sizes, backbone=VIT):
    """What is checked of a recipe with views of these sizes."""
    method = make_method(name, backbone=backbone)
    counts = {views.name: view_shape(views)[0] for views in method.needs}
    views = {group: ViewGroup(count=counts[group], size=size) for group, size in sizes.items()}
    labelled = LabelledConfig(shards="") if any(views.labelled for views in method.needs) else None
    check_recipe(method, create_backbone(backbone), views, DataConfig(shards="", batch_size=8, labelled=labelled))
    facts = RunFacts(100, 3, 8, {group: (size,) for group, size in sizes.items()}, (0.5,) * 3, (0.5,) * 3)
    method.prepare(facts)


@pytest.mark.parametrize(
    ("name", "sizes", "sentence"),
    [
        ("dino", {"global": 16, "local": 10}, r"augment\.local\.size must be a multiple .* size 4\. Got 10; try 8\."),
        ("mae", {"image": 24}, r"augment\.image\.size must be that of the backbone, 4 \* 4 pixels\. Got 24; try"),
        ("fixmatch", {"weak": 16, "strong": 20}, r"strong\.size must be the same\. Got 16 and 20\."),
        ("simclr", {"view": 2}, r"Got 2; try 4\."),
    ],
)
def test_views_that_the_backbone_cannot_take(name, sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(name, sizes)


@pytest.mark.parametrize("backbone", [VIT, CNN])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_views_that_fit_are_let_through(name, backbone):
    if name != "mae" or backbone is VIT:
        check(name, {views.name: view_shape(views)[1] for views in needs(name)}, backbone)


@pytest.mark.parametrize(
    ("found", "names", "wanted", "classes"),
    [(3, None, None, 3), (3, ("a", "b", "c"), None, 3), (3, ("a", "b", "c"), 3, 3), (3, None, 5, 5)],
)
def test_the_number_of_classes_is_that_of_the_labelled_images(found, names, wanted, classes):
    facts = RunFacts(100, found, 8, {}, (0.5,) * 3, (0.5,) * 3, names)
    assert facts.classes(wanted) == classes


@pytest.mark.parametrize(("found", "names", "wanted"), [(3, ("a", "b", "c"), 5), (3, None, 2), (3, ("a", "b", "c"), 2)])
def test_another_number_of_classes_is_refused(found, names, wanted):
    facts = RunFacts(100, found, 8, {}, (0.5,) * 3, (0.5,) * 3, names)
    with pytest.raises(ConfigError, match=rf"number of classes of the labelled images, 3\. Got {wanted}; leave it out"):
        facts.classes(wanted)

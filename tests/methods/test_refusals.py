"""What a run is refused for before its first step, and in which words."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.batch import RunFacts, Views
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.data.stream import DataConfig, LabelledConfig
from ssl_pipeline.training.preflight import check_recipe
from tests.tiny import CNN, CONFIGS, VIT, make_method, needs, takes_cnn, view_shape, write_shards

WIDTHS = {
    "cifar10_byol_resnet18": ["projector_hidden_dim", "projector_dim", "predictor_hidden_dim"],
    "cifar10_moco_resnet18": ["projector_hidden_dim", "projector_dim"],
    "cifar10_simsiam_resnet18": ["projector_hidden_dim", "projector_dim", "predictor_hidden_dim"],
    "cifar10_dinov2_vit_tiny": ["head_hidden_dim", "head_bottleneck_dim", "num_prototypes"],
    "mae_vitb16": ["decoder_dim"],
}


def refusal(folder, recipe, *settings, batch_size=8):
    """What the command prints after `error: `; no step is made, and no weight saved."""
    shards = write_shards(folder / "shards")
    small = [f"method.{width}=16" for width in WIDTHS[recipe]]
    run = ["data.workers=0", f"output={folder / 'run'}", "knn=null"]
    run += [f"data.batch_size={batch_size}", "train.precision=no", "train.steps=1"]
    images = [] if any(setting.startswith("data.shards=") for setting in settings) else [f"data.shards={shards}"]
    config = load(PretrainConfig, [f"recipe={recipe}", *images, *run, *small, *settings], recipes=RECIPES)
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


def test_neighbours_of_one_image_at_a_time(tmp_path):
    sentence = refusal(tmp_path, "cifar10_dinov2_vit_tiny", "train.accumulate=4", batch_size=1)
    assert sentence == (
        "KoLeo looks for the nearest other image, so it needs at least 2 at once. Got 1; raise data.batch_size, or "
        "set method.koleo_weight=0."
    )


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (30, "augment.global.size must be a multiple of the backbone's patch size 4. Got 30; try 32."),
        (
            8,
            "augment.global.size=8 is too small for masks in blocks: blocks of 4 patches need a grid of more than 2 x",
        ),
    ],
)
def test_views_in_which_no_patch_can_be_masked(tmp_path, size, sentence):
    assert sentence in refusal(tmp_path, "cifar10_dinov2_vit_tiny", f"augment.global.size={size}")


def test_mae_on_a_cnn(tmp_path):
    sentence = refusal(tmp_path, "mae_vitb16", "backbone.name=test_resnet")
    assert sentence.startswith(
        "MAE needs a backbone with patch tokens (a ViT). 'test_resnet' has none. Networks with patch tokens"
    )


@pytest.mark.parametrize("recipe", ["mae_vitb16", "cifar10_byol_resnet18"])
def test_initial_weights_of_a_vit_on_a_cnn(tmp_path, recipe):
    """Whatever the method is, the setting is named."""
    network = ("backbone.name=test_resnet", "backbone.small_images=false", "backbone.initial_weights=mae")
    sentence = refusal(tmp_path, recipe, *network)
    assert sentence == "backbone.initial_weights=mae needs a ViT. 'test_resnet' is not one."


def test_local_crops_for_a_method_without_them(tmp_path):
    sentence = refusal(tmp_path, "cifar10_byol_resnet18", "augment.local={count: 2, size: 16}")
    assert sentence == "BYOL does not use the view group augment.local. It reads view."


def check(name, sizes, backbone=VIT):
    """What is checked of a recipe with views of these sizes."""
    method = make_method(name, backbone=backbone)
    needed = {views.name: views for views in method.needs}
    views = {
        group: ViewGroup(count=view_shape(needed[group])[0], size=size, crops_of=needed[group].crops_of)
        for group, size in sizes.items()
    }
    labelled = LabelledConfig(shards="") if any(views.labelled for views in method.needs) else None
    check_recipe(method, create_backbone(backbone), views, DataConfig(shards="", batch_size=8, labelled=labelled))
    facts = RunFacts(100, 3, 8, {group: (size,) for group, size in sizes.items()}, (0.5,) * 3, (0.5,) * 3)
    method.prepare(facts)


@pytest.mark.parametrize(
    ("name", "sizes", "sentence"),
    [
        ("dino", {"global": 16, "local": 10}, r"augment\.local\.size must be a multiple .* size 4\. Got 10; try 8\."),
        ("distillation", {"image": 16, "teacher": 9}, r"augment\.teacher\.size=9 does not suit .* multiples"),
        ("beit", {"image": 16, "tokens": 20}, r"augment\.tokens\.size must be 16 for images of 16 pixels.* Got 20\."),
        ("beit", {"image": 8, "tokens": 8}, r"num_masked must be below the 4 patches of an image of 8 pixels\. Got 6"),
        ("simmim", {"image": 20}, r"image\.size must be a multiple of method\.mask_size, 8\. Got 20; try"),
        ("mae", {"image": 24}, r"augment\.image\.size must be that of the backbone, 4 \* 4 pixels\. Got 24; try"),
        ("fixmatch", {"weak": 16, "strong": 20}, r"strong\.size must be the same\. Got 16 and 20\."),
        ("simclr", {"view": 2}, r"Got 2; try 4\."),
        (
            "ibot",
            {"global": 4, "local": 8},
            r"^augment\.global\.size=4 is too small for masks in blocks: blocks of 1 patches need a grid of more than "
            r"1 x 1 patches of 4 pixels\. Got 1 x 1; try larger views",
        ),
    ],
)
def test_views_that_the_backbone_cannot_take(name, sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(name, sizes)


def test_a_view_for_another_network_need_not_suit_the_backbones_patches():
    check("distillation", {"image": 16, "teacher": 18})  # patches of 4 and of 2


def test_a_gram_teacher_that_sees_other_crops_is_refused():
    method = make_method("dinov3")
    views = {name: ViewGroup(count=2, size=16) for name in ("global", "gram")}
    with pytest.raises(ConfigError, match=r"^augment\.gram\.crops_of must be global for DINOv3, .* Got none\.$"):
        check_recipe(method, method.backbone, views, DataConfig(shards="", batch_size=8))
    with pytest.raises(ConfigError, match=r"^DINOv3 needs the view group augment\.gram\. The recipe has global\.$"):
        check_recipe(method, method.backbone, {"global": views["global"]}, DataConfig(shards="", batch_size=8))


def test_images_that_the_backbone_cannot_take_are_told_before_they_are_read(tmp_path):
    settings = ["backbone.name=convnext_atto", "augment.view.size=16", "data.shards=nowhere"]
    sentence = refusal(tmp_path, "cifar10_byol_resnet18", *settings)
    assert sentence.startswith(
        "augment.view.size=16 does not suit the backbone 'convnext_atto': it does not take images of"
    )
    assert sentence.endswith("Try augment.view.size=32.")


def test_views_that_another_network_is_shown_may_have_any_size():
    method = make_method("dino", backbone=VIT)
    method.needs = (*method.needs, Views("token", for_backbone=False))
    views = {name: ViewGroup(count=2, size=size) for name, size in (("global", 16), ("token", 9))}
    check_recipe(method, create_backbone(VIT), views, DataConfig(shards="", batch_size=8))


@pytest.mark.parametrize("backbone", [VIT, CNN])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_views_that_fit_are_let_through(name, backbone):
    if backbone is VIT or takes_cnn(name):
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
    with pytest.raises(ConfigError, match=rf"number of classes of the labelled images, 3\. Got {wanted}; method"):
        facts.classes(wanted)

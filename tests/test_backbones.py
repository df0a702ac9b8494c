"""Backbones: features of any timm model, tokens of a ViT at any size, weights in files."""

import json
import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath

from ssl_pipeline.backbones import (
    BackboneConfig,
    Preprocessing,
    TokenBackbone,
    create_backbone,
    load_backbone,
    save_backbone,
    sincos_position_embedding,
    without_drop_path,
)
from ssl_pipeline.config import ConfigError
from ssl_pipeline.masking import patchify, take_patches
from ssl_pipeline.positions import resample_positions

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PREPROCESSING = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def tiny_vit(**changes):
    config = BackboneConfig(
        name="vit_tiny_patch16_224", arguments={**TINY_VIT, **changes.pop("arguments", {})}, **changes
    )
    torch.manual_seed(0)
    return create_backbone(config).eval()


def images(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "regnetx_002"])
def test_a_cnn_gives_pooled_features_of_embed_dim(name):
    backbone = create_backbone(BackboneConfig(name=name)).eval()
    features = backbone(images(64))
    assert features.shape == (2, backbone.embed_dim)
    assert not isinstance(backbone, TokenBackbone)
    torch.testing.assert_close(features, backbone.model(images(64)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 2},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "map"},
        {"pos_embed": "none"},
        {"pre_norm": True},
    ],
)
def test_a_vit_gives_the_features_of_timm_at_its_own_size(arguments):
    backbone = tiny_vit(arguments=arguments)
    assert isinstance(backbone, TokenBackbone)
    assert backbone(images()).shape == (2, backbone.embed_dim)
    torch.testing.assert_close(backbone(images()), backbone.model(images()))


@pytest.mark.parametrize("size", [16, 24, 64])
def test_a_vit_takes_images_of_any_size(size):
    backbone = tiny_vit()
    assert backbone(images(size)).shape == (2, 48)
    backbone(images(size)).sum().backward()
    assert backbone.model.pos_embed.grad.abs().min() > 0 or size < 32


def test_an_image_between_two_patches_is_refused():
    with pytest.raises(ValueError, match=r"multiples of the patch size 8. Got 30x30"):
        tiny_vit()(images(30))


def test_embed_and_encode_work_on_kept_tokens_alone():
    backbone = tiny_vit()
    tokens = backbone.embed(images())
    assert tokens.shape == (2, 16, 48)
    assert (backbone.patch_size, backbone.grid, backbone.num_prefix_tokens) == (8, (4, 4), 1)
    encoded = backbone.encode(tokens[:, [3, 7, 1]])
    assert encoded.shape == (2, 4, 48)
    # without positions between them, attention does not care about the order of its tokens
    torch.testing.assert_close(backbone.encode(tokens[:, [1, 3, 7]])[:, [0, 2, 3, 1]], encoded)


@pytest.mark.parametrize(
    "arguments", [{}, {"reg_tokens": 2}, {"pos_embed": "none"}, {"no_embed_class": True}, {"pre_norm": True}]
)
def test_some_patches_are_embedded_as_in_the_whole_image(arguments):
    backbone = tiny_vit(arguments=arguments).double()
    whole = images().double()
    places = torch.tensor([[3, 7, 1], [15, 0, 8]])
    expected = take_patches(backbone.embed(whole), places)
    actual = backbone.embed_patches(take_patches(patchify(whole, 8), places), places)
    torch.testing.assert_close(actual, expected)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(result.square().sum(), trained, allow_unused=True) for result in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_positions_belong_to_their_patch():
    backbone = tiny_vit()
    with torch.no_grad():
        backbone.model.patch_embed.proj.weight.zero_()
        backbone.model.patch_embed.proj.bias.zero_()
    torch.testing.assert_close(backbone.embed(images())[0], backbone.model.pos_embed[0, 1:])


@pytest.mark.parametrize("new", [(6, 6), (9, 14), (20, 17)])
def test_positions_are_resampled_as_the_official_dino_does(new):
    table = torch.randn(1, 14 * 14, 5, dtype=torch.float64, requires_grad=True)
    scale = tuple((side + 0.1) / 14 for side in new)
    expected = F.interpolate(table.view(1, 14, 14, 5).permute(0, 3, 1, 2), scale_factor=scale, mode="bicubic")
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
    actual = resample_positions(table, (14, 14), new)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    gradients = [torch.autograd.grad((result * weights).sum(), table)[0] for result in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_positions_of_the_same_grid_are_left_alone():
    table = torch.randn(1, 12, 5)
    assert resample_positions(table, (3, 4), (3, 4)) is table


def test_positions_stay_in_full_precision_under_autocast():
    table = torch.randn(1, 16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = resample_positions(table, (4, 4), (3, 3))
    assert torch.equal(inside, resample_positions(table, (4, 4), (3, 3)))


def test_a_vit_compiles_in_place_for_two_sizes():
    backbone = tiny_vit()
    expected = [backbone(images(size)) for size in (32, 16)]
    backbone.compile(backend="eager", fullgraph=True)  # traced, not translated, which would take a minute
    torch.testing.assert_close([backbone(images(size)) for size in (32, 16)], expected)


def test_sincos_positions_equal_the_loop():
    dim, rows, columns = 8, 2, 3
    table = sincos_position_embedding(dim, (rows, columns), class_token=True)
    expected = [[0.0] * dim]
    for row in range(rows):
        for column in range(columns):
            entry = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected.append(entry)
    torch.testing.assert_close(table, torch.tensor(expected))
    assert torch.equal(sincos_position_embedding(dim, (rows, columns), class_token=False), table[1:])
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_position_embedding(6, (2, 2), class_token=False)


def test_small_images_change_the_stem_of_a_resnet():
    backbone = create_backbone(BackboneConfig(name="resnet18", small_images=True))
    stem = backbone.model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert abs(stem.weight.std().item() - math.sqrt(2 / (64 * 9))) < 0.005
    assert backbone.model.forward_features(images()).shape == (2, 512, 4, 4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18d", "convnext_atto"])
def test_small_images_are_refused_where_there_is_no_such_stem(name):
    with pytest.raises(ConfigError, match=f"'{name}' is none"):
        create_backbone(BackboneConfig(name=name, small_images=True))


def test_drop_path_grows_to_the_last_block_and_can_be_switched_off():
    backbone = tiny_vit(drop_path=0.2)
    rates = [part.drop_prob for part in backbone.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.2)
    without_drop_path(backbone)
    backbone.train()
    assert torch.equal(backbone(images()), backbone(images()))


def step_of(**changes):
    """Features and gradients of a training step with drop path, and the tokens that the step keeps for its backward."""
    backbone, kept = tiny_vit(drop_path=0.5, **changes).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        torch.manual_seed(1)
        features = backbone(images(count=8))
    features.square().sum().backward()
    return features.detach(), [parameter.grad for parameter in backbone.parameters()], sum(kept)


def test_checkpointed_activations_change_nothing_but_the_memory():
    features, gradients, kept = step_of()
    checkpointed_features, checkpointed_gradients, kept_then = step_of(checkpoint_activations=True)
    assert torch.equal(checkpointed_features, features)
    torch.testing.assert_close(checkpointed_gradients, gradients, rtol=0, atol=1e-7)
    assert kept_then < kept / 3


def test_a_cnn_without_batch_norm_can_checkpoint_its_activations():
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        backbone = create_backbone(BackboneConfig(name="convnext_atto", checkpoint_activations=checkpoint))
        assert any(getattr(part, "grad_checkpointing", False) for part in backbone.modules()) == checkpoint
        backbone(images(32)).sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet28_2"])
def test_batch_norm_and_checkpointed_activations_are_refused(name):
    with pytest.raises(ConfigError, match=f"needs a network without batch norm.* '{name}' has some"):
        create_backbone(BackboneConfig(name=name, checkpoint_activations=True))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"name": "resnet81"}, r"No timm model 'resnet81'. Did you mean 'resnet\d+"),
        ({"name": "resnet18", "arguments": {"depht": 3}}, "timm cannot create 'resnet18': .*depht"),
        (
            {"name": "resnet18", "weights": "no_such_tag"},
            "no pretrained 'resnet18.no_such_tag'. Known: .*resnet18.a1_in1k",
        ),
        ({"name": "resnet18", "weights": "missing.safetensors"}, "cannot read weights from missing.safetensors"),
        ({"name": "resnet18", "weights": "a1_in1k", "small_images": True}, "Leave one of them out"),
    ],
)
def test_a_mistake_is_one_line(config, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        create_backbone(BackboneConfig(**config))
    assert "\n" not in str(error.value)


def test_arguments_with_a_setting_of_their_own_are_refused():
    with pytest.raises(ValueError, match="must not hold 'num_classes'"):
        BackboneConfig(name="resnet18", arguments={"num_classes": 10})


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT, drop_path=0.1),
        BackboneConfig(name="resnet18", small_images=True),
    ],
)
def test_a_saved_backbone_comes_back(tmp_path, config):
    backbone = create_backbone(config).eval()
    save_backbone(tmp_path, backbone, config, PREPROCESSING)
    loaded, description, preprocessing = load_backbone(tmp_path)
    assert torch.equal(loaded.eval()(images()), backbone(images()))
    assert (description.name, description.arguments, description.small_images) == (
        config.name,
        config.arguments,
        config.small_images,
    )
    assert preprocessing == PREPROCESSING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_a_stranger_loads_a_saved_backbone_with_timm_alone(tmp_path):
    backbone = tiny_vit()
    save_backbone(tmp_path, backbone, BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT), PREPROCESSING)
    description = json.loads((tmp_path / "backbone.json").read_text())
    model = timm.create_model(description["name"], num_classes=0, **description["arguments"])
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "backbone.safetensors"))
    torch.testing.assert_close(model.eval()(images()), backbone(images()))


def test_a_directory_without_a_backbone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no backbone.json"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no description of a backbone"):
        load_backbone(tmp_path)


def weights_of(backbone):
    return dict(backbone.model.state_dict())


def start_from(path, **changes):
    return tiny_vit(weights=str(path), **changes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_classifier_file_are_loaded_without_the_classifier(tmp_path, suffix):
    backbone = tiny_vit()
    torch.nn.init.normal_(backbone.model.cls_token)
    weights = {**weights_of(backbone), "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": weights}, path)
    else:
        safetensors.torch.save_file(weights, path)
    torch.testing.assert_close(start_from(path)(images()), backbone(images()))


def test_a_position_table_of_another_size_is_resampled(tmp_path):
    backbone = tiny_vit()
    torch.save(weights_of(backbone), tmp_path / "weights.pth")
    larger = start_from(tmp_path / "weights.pth", arguments={"img_size": 48})
    positions = backbone.model.pos_embed
    torch.testing.assert_close(larger.model.pos_embed[:, 0], positions[:, 0])
    torch.testing.assert_close(larger.model.pos_embed[:, 1:], resample_positions(positions[:, 1:], (4, 4), (6, 6)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: [w.pop(name) for name in list(w)[:5]], r"misses cls_token, pos_embed, .* \(5 in all\)"),
        (lambda w: w.update({"extra.weight": torch.ones(1)}), r"has unknown extra.weight \(1 in all\)"),
        (lambda w: w.update({"norm.bias": torch.ones(3)}), r"norm.bias must be \(48,\). Got \(3,\)"),
        (lambda w: w.update({"epoch": 3}), "holds no plain table of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, sentence):
    weights = weights_of(tiny_vit())
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=sentence):
        start_from(tmp_path / "weights.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"weights": BackboneConfig(name="resnet18")}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="cannot read weights") as error:
        start_from(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)

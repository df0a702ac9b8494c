"""Each official layout is read to the same features, and timm's own loader agrees where it has one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone
from tests.backbones.weights import official
from tests.backbones.weights.official import RESNET, RESNET_ARGUMENTS, VIT, State, below, random_network

DINOV2 = "vit_small_patch14_dinov2"
DINOV2_REG = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_small_patch16_dinov3_qkvb"
DINOV3_GATED = "vit_small_plus_patch16_dinov3_qkvb"
SWIN = {"img_size": 64, "patch_size": 4, "embed_dim": 24, "window_size": 2}
SHARED = {**VIT, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "global_pool": "token"}
CONVNEXT = "test_convnext"

# layout: timm's name, its arguments, what the official code makes of its tensors (and of those of another network)
LAYOUTS: dict[str, tuple[str, dict[str, object], Callable[..., object]]] = {
    "timm": ("vit_tiny_patch16_224", VIT, lambda own, other: own),
    "DINO, backbone alone": ("vit_tiny_patch16_224", VIT, lambda own, other: own),
    "DINO, all": ("vit_tiny_patch16_224", VIT, official.dino),
    "iBOT, backbone alone": ("vit_tiny_patch16_224", VIT, lambda own, other: {"state_dict": own}),
    "iBOT, all": ("vit_tiny_patch16_224", {**VIT, "init_values": 0.1}, official.ibot),
    "MAE": ("vit_tiny_patch16_224", VIT, lambda own, other: official.mae(own)),
    "MoCo v3, ViT": ("vit_tiny_patch16_224", VIT, official.moco_v3_vit),
    "MoCo v3, ResNet": (RESNET, RESNET_ARGUMENTS, official.moco_v3_vit),
    "MoCo v1, v2": (RESNET, RESNET_ARGUMENTS, official.moco_v2),
    "SimSiam": (RESNET, RESNET_ARGUMENTS, lambda own, other: official.simsiam(own)),
    "SwAV": (RESNET, RESNET_ARGUMENTS, lambda own, other: official.swav(own)),
    "SwAV, all": (RESNET, RESNET_ARGUMENTS, lambda own, other: {"state_dict": official.swav(own), "epoch": 3}),
    "BYOL, byol-pytorch": (RESNET, RESNET_ARGUMENTS, official.byol_pytorch),
    "BYOL, PyTorch-BYOL": (RESNET, RESNET_ARGUMENTS, official.byol_sthalles),
    "BYOL, converted": (RESNET, RESNET_ARGUMENTS, lambda own, other: official.byol_converted(own)),
    "the average of timm's training": (
        RESNET,
        RESNET_ARGUMENTS,
        lambda own, other: {"state_dict": other, "state_dict_ema": own, "epoch": 3},
    ),
    "ResNet in a row, deep in a file": (
        RESNET,
        RESNET_ARGUMENTS,
        lambda own, other: {"state_dict": below("model.trunk.", official.in_a_row(own))},
    ),
    "compiled and in DDP": ("vit_tiny_patch16_224", VIT, lambda own, other: {"model": below("module._orig_mod.", own)}),
    "DINOv2": (DINOV2, VIT, lambda own, other: official.dinov2(own)),
    "DINOv2, registers": (DINOV2_REG, VIT, lambda own, other: official.dinov2(own, registers=4)),
    "DINOv2, training": (DINOV2_REG, VIT, lambda own, other: official.dinov2_training(own, registers=4)),
    "DINOv3": (DINOV3, VIT, lambda own, other: official.dinov3(own)),
    "DINOv3, SwiGLU": (DINOV3_GATED, VIT, lambda own, other: official.dinov3(own)),
    "DINOv3, ConvNeXt": (CONVNEXT, {}, lambda own, other: official.official_convnext(own)),
    "BEiT, masked images": ("beit_base_patch16_224", SHARED, lambda own, other: official.beit(own)),
    "BEiT, fine-tuned": ("beit_base_patch16_224", VIT, lambda own, other: official.beit(own)),
    "SimMIM, ViT": ("beit_base_patch16_224", SHARED, lambda own, other: official.simmim(own)),
    "SimMIM, Swin": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        lambda own, other: official.simmim(official.official_swin(own)),
    ),
    "Hugging Face, ViT": (
        "vit_tiny_patch16_224",
        VIT,
        lambda own, other: official.hugging_face_vit(own) | {"pooler.dense.weight": torch.ones(48, 48)},
    ),
    "Hugging Face, MAE": (
        "vit_tiny_patch16_224",
        VIT,
        lambda own, other: official.hugging_face_vit(own, prefix="vit.") | {"decoder.mask_token": torch.ones(1, 1, 16)},
    ),
    "Hugging Face, DINOv2": (
        DINOV2_REG,
        VIT,
        lambda own, other: official.hugging_face_vit(
            official.dinov2(own, registers=4), prefix="dinov2_with_registers.", layer_scale="lambda1"
        ),
    ),
    "Hugging Face, DINOv3": (DINOV3, VIT, lambda own, other: official.hugging_face_dinov3(own)),
    "Hugging Face, DINOv3, SwiGLU": (
        DINOV3_GATED,
        VIT,
        lambda own, other: official.hugging_face_dinov3(own, gated=True),
    ),
    "Hugging Face, Swin": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        lambda own, other: official.hugging_face_swin(own),
    ),
    "Hugging Face, BEiT": (
        "beit_base_patch16_224",
        VIT,
        lambda own, other: official.hugging_face_vit(own, prefix="beit.", key_bias=False),
    ),
}


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def loaded(name: str, arguments: dict[str, object], path: object, **more: object) -> Backbone:
    config = BackboneConfig(name=name, arguments=arguments, weights=str(path), **more)
    return create_backbone(config).eval()


def size_of(arguments: dict[str, object]) -> int:
    return int(arguments.get("img_size", 32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_in_an_official_layout_gives_the_features_of_its_network(tmp_path, layout):
    name, arguments, official_code = LAYOUTS[layout]
    network, other = random_network(name, 0, **arguments), random_network(name, 1, **arguments)
    torch.save(official_code(network.state_dict(), other.state_dict()), tmp_path / "file.pth")
    backbone = loaded(name, arguments, tmp_path / "file.pth")
    expected = network(images(size_of(arguments)))
    torch.testing.assert_close(backbone(images(size_of(arguments))), expected, rtol=1e-4, atol=1e-5)
    assert (other(images(size_of(arguments))) - expected).abs().max() > 1e-2
    assert backbone.origin.text.startswith(f"{tmp_path}/file.pth, took ")


@pytest.mark.parametrize(
    ("layout", "usual"),
    [
        ("DINO, all", "teacher"),
        ("iBOT, all", "teacher"),
        ("MoCo v1, v2", "student"),
        ("MoCo v3, ViT", "student"),
        ("BYOL, byol-pytorch", "student"),
        ("BYOL, PyTorch-BYOL", "student"),
    ],
)
def test_teacher_and_student_can_be_asked_for(tmp_path, layout, usual):
    name, arguments, official_code = LAYOUTS[layout]
    network, other = random_network(name, 0, **arguments), random_network(name, 1, **arguments)
    torch.save(official_code(network.state_dict(), other.state_dict()), tmp_path / "file.pth")
    unusual = {"teacher": "student", "student": "teacher"}[usual]
    for asked, expected in ((usual, network), (unusual, other)):
        backbone = loaded(name, arguments, tmp_path / "file.pth", weights_from=asked)
        torch.testing.assert_close(backbone(images()), expected(images()), rtol=1e-4, atol=1e-5)


def test_a_safetensors_file_is_read_as_a_file_of_torch(tmp_path):
    network = random_network(DINOV3, **VIT)
    tensors = {name: tensor.contiguous() for name, tensor in official.hugging_face_dinov3(network.state_dict()).items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    backbone = loaded(DINOV3, VIT, tmp_path / "model.safetensors")
    torch.testing.assert_close(backbone(images()), network(images()), rtol=1e-4, atol=1e-5)


# timm's own loader


def by_timm(name: str, arguments: dict[str, object], content: dict[str, object]) -> nn.Module:
    """The network as timm fills it from official files."""
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    loader = sys.modules[type(model).__module__].checkpoint_filter_fn
    left = model.load_state_dict(loader(content, model), strict=False)
    assert left.missing_keys == []
    return model


@pytest.mark.parametrize(
    "layout",
    [
        "timm",
        "MAE",
        "DINOv2",
        "DINOv2, registers",
        "DINOv3",
        "DINOv3, SwiGLU",
        "DINOv3, ConvNeXt",
        "BEiT, masked images",
        "BEiT, fine-tuned",
    ],
)
@pytest.mark.parametrize("img_size", [32, 48])
def test_timm_loads_the_same(tmp_path, layout, img_size):
    name, arguments, official_code = LAYOUTS[layout]
    content = official_code(random_network(name, **arguments).state_dict(), None)
    torch.save(content, tmp_path / "file.pth")
    larger = {**arguments, "img_size": img_size} if "img_size" in arguments else arguments
    ours = loaded(name, larger, tmp_path / "file.pth")
    theirs = by_timm(name, larger, content)
    tables = {"pos_embed"} if img_size > 32 and "vit_" in name else set()  # resampled as DINO does it, not as timm
    for tensor_name, tensor in theirs.state_dict().items():
        if tensor_name not in tables:
            torch.testing.assert_close(ours.model.state_dict()[tensor_name], tensor, rtol=1e-5, atol=1e-6)
    if not tables:
        torch.testing.assert_close(ours(images(img_size)), theirs(images(img_size)), rtol=1e-4, atol=1e-5)


def test_timm_loads_the_same_swin(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    content = official.official_swin(random_network(name, **SWIN).state_dict())
    torch.save(content, tmp_path / "file.pth")
    larger = {**SWIN, "window_size": 4}
    ours, theirs = loaded(name, larger, tmp_path / "file.pth"), by_timm(name, larger, content)
    torch.testing.assert_close(ours(images(64)), theirs(images(64)), rtol=1e-4, atol=1e-5)


# One table for all blocks, tables of another size, and torchvision's networks


def test_one_table_of_distances_becomes_that_of_each_block(tmp_path):
    network = random_network("beit_base_patch16_224", **SHARED)
    torch.save(official.beit(network.state_dict()), tmp_path / "file.pth")
    separate = {**VIT, "global_pool": "token"}
    backbone = loaded("beit_base_patch16_224", separate, tmp_path / "file.pth")
    torch.testing.assert_close(backbone(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_hugging_faces_beit_for_masked_images_keeps_its_last_norm_beside_the_network(tmp_path):
    network = random_network("beit_base_patch16_224", **SHARED)
    state: State = official.hugging_face_vit(network.state_dict(), key_bias=False)
    norms = {name: state.pop(name) for name in ("layernorm.weight", "layernorm.bias")}
    del state["classifier.weight"]
    torch.save(below("beit.", state) | norms | {"lm_head.weight": torch.ones(8, 48)}, tmp_path / "file.bin")
    backbone = loaded("beit_base_patch16_224", SHARED, tmp_path / "file.bin")
    torch.testing.assert_close(backbone(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_biases_of_zero_need_no_network_with_biases(tmp_path):
    network = random_network("vit_small_patch16_dinov3", **VIT)
    zeros = {f"blocks.{block}.attn.qkv.bias": torch.zeros(144) for block in (0, 1)}
    torch.save(official.dinov3(network.state_dict()) | zeros, tmp_path / "file.pth")
    backbone = loaded("vit_small_patch16_dinov3", VIT, tmp_path / "file.pth")
    torch.testing.assert_close(backbone(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_torchvisions_resnet_has_timms_features(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    backbone = loaded("resnet18", {}, tmp_path / "resnet18.pth")
    assert "took 120 of 122 tensors; left: 2 of the head" in str(backbone.origin)
    network.fc = nn.Identity()
    torch.testing.assert_close(backbone(images(64)), network(images(64)), rtol=1e-4, atol=1e-4)


def test_torchvisions_vit_has_timms_features(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    network = torchvision.models.VisionTransformer(**sizes).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    network.heads = nn.Identity()
    backbone = loaded("vit_tiny_patch16_224", VIT, tmp_path / "vit.pth")
    torch.testing.assert_close(backbone(images()), network(images()), rtol=1e-4, atol=1e-5)

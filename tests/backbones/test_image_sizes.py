"""What a backbone is found not to take before the run, and that looking for it changes nothing."""

from __future__ import annotations

import copy
import time

import pytest
import timm
import torch

from ssl_pipeline.backbones import BackboneConfig, check_image_sizes, create_backbone
from ssl_pipeline.backbones.memory_format import choose_memory_format
from ssl_pipeline.config import ConfigError, validate
from tests.backbones.tiny_vit import images, tiny_vit

SIZE = "augment.view.size"


def on_meta(name, **arguments):
    with torch.device("meta"):
        return create_backbone(validate(BackboneConfig, {"name": name, "arguments": arguments}))


def refusal(backbone, size):
    with pytest.raises(ConfigError) as error:
        check_image_sizes(backbone, {SIZE: (size,)})
    assert len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "size", "advice"),
    [
        ("cait_xxs24_224", {}, 96, f"Try {SIZE}=224, or backbone.arguments.img_size=96."),
        ("beit_base_patch16_224", {}, 64, f"Try {SIZE}=224, or backbone.arguments.img_size=64."),
        ("convnext_atto", {}, 16, f"Try {SIZE}=32."),
        ("vgg11", {}, 16, f"Try {SIZE}=32."),  # the last pooling finds a map smaller than its window
        ("vit_tiny_patch16_224", {}, 90, f"Try {SIZE}=96."),
    ],
)
def test_what_the_network_does_not_take_is_told_with_what_it_takes(name, arguments, size, advice):
    sentence = refusal(on_meta(name, **arguments), size)
    assert sentence.startswith(
        f"{SIZE}={size} does not suit the backbone '{name}': it does not take images of 3 channels"
    )
    assert sentence.endswith(advice)
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 8), ("vit_tiny_patch16_224", 96), ("swin_tiny_patch4_window7_224", 96)]
)
def test_what_the_network_takes_is_let_through(name, size):
    check_image_sizes(on_meta(name), {SIZE: (size,), "augment.other.size": (size, 2 * size)})


def test_the_key_of_the_group_that_does_not_fit_is_named_and_no_argument_that_the_others_would_not_fit():
    with pytest.raises(ConfigError, match=r"^augment\.local\.size=96, 64 .* 96x96 .* Try augment\.local\.size=224\.$"):
        check_image_sizes(on_meta("cait_xxs24_224"), {"augment.global.size": (224,), "augment.local.size": (96, 64)})


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "vit_small_patch16_rope_mixed_224"])
def test_the_look_changes_nothing(name):
    backbone = create_backbone(BackboneConfig(name=name, drop_path=0.1)).train()
    before, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    check_image_sizes(backbone, {SIZE: (64, 96)} if name != "test_vit" else {SIZE: (160, 96)})
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in backbone.modules())
    assert not any(parameter.is_meta for parameter in backbone.parameters())
    assert not getattr(getattr(backbone, "_adapter", None), "_rotations", {})


def test_a_vit_computes_at_another_size_what_it_would_have_without_the_look():
    plain, looked_at = tiny_vit(), tiny_vit()
    check_image_sizes(looked_at, {SIZE: (64,)})
    assert torch.equal(looked_at(images(64)), plain(images(64)))


def test_a_large_network_costs_no_computation():
    backbone = on_meta("vit_large_patch16_224")
    began = time.process_time()
    check_image_sizes(backbone, {SIZE: (224, 96)})
    assert time.process_time() - began < 10  # 0.6 s; a pass with numbers of four such images: 20 s


class Views(torch.nn.Module):
    """Asks for a view of what a convolution made, as channels last does not have it."""

    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (3, 8, 8)}
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(images).view(len(images), -1)


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), torch.channels_last),
        (Views(), torch.contiguous_format),
        (torch.nn.Conv3d(3, 4, 3), torch.contiguous_format),
    ],
)
def test_channels_last_is_forced_on_no_network_that_cannot_take_it(model, chosen):
    assert choose_memory_format(model) is chosen
    convolution = next(model.parameters())
    assert convolution.ndim == 5 or convolution.is_contiguous(memory_format=chosen)


def test_arguments_may_be_lists():
    config = {"name": "swin_tiny_patch4_window7_224", "arguments": {"depths": [1, 1], "num_heads": [1, 2]}}
    config["arguments"] |= {"embed_dim": 16, "img_size": 56}
    backbone = create_backbone(validate(BackboneConfig, config))
    assert [len(stage.blocks) for stage in backbone.model.layers] == [1, 1]


def test_torch_logs_no_traceback_of_a_layout_that_is_only_tried(capfd):
    model = timm.create_model("levit_128s", img_size=96)  # its own size is 224: both tries fail
    choose_memory_format(model)
    assert capfd.readouterr().err == ""

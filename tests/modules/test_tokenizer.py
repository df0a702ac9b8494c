"""A tokenizer's file, DALL-E's encoder under its released names, and the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import write_tensors
from ssl_pipeline.modules.tokenizer import TokenDecoder, Tokenizer, load_tokenizer, save_tokenizer
from tests.tiny import CNN, VIT

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
SMALL_DALLE = BackboneConfig(name="dalle_encoder", arguments={"hidden_dim": 8, "blocks_per_group": 2})

THREE_GROUPS = BackboneConfig(name="dalle_encoder", arguments={**SMALL_DALLE.arguments, "num_groups": 3})


def tokenizer(backbone=SMALL_DALLE, num_tokens=7):
    torch.manual_seed(0)
    return Tokenizer(create_backbone(backbone), num_tokens).eval()


@pytest.mark.parametrize(("backbone", "stride"), [(SMALL_DALLE, 8), (THREE_GROUPS, 4), (VIT, 4), (CNN, 8)])
def test_a_tokenizer_gives_each_cell_a_code(backbone, stride):
    network, images = tokenizer(backbone), torch.randn(2, 3, 16, 16)
    assert network.stride == stride
    logits = network(images)
    assert logits.shape == (2, 7, 16 // stride, 16 // stride)
    codes = network.tokens(images)
    for cell in range((16 // stride) ** 2):
        row, column = divmod(cell, 16 // stride)
        assert torch.equal(codes[:, cell], logits[:, :, row, column].argmax(dim=1))


@pytest.mark.parametrize("backbone", [SMALL_DALLE, VIT, CNN])
def test_a_file_brings_the_tokenizer_back(backbone, tmp_path):
    network, images, path = tokenizer(backbone), torch.randn(2, 3, 16, 16), tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, network, mean=MEAN, std=STD)
    loaded, mean, std = load_tokenizer(path)
    assert (mean, std, loaded.num_tokens) == (MEAN, STD, 7)
    assert torch.equal(loaded.eval()(images), network(images))


def test_a_tokenizer_that_is_not_finite_is_refused(tmp_path):
    network, path = tokenizer(CNN), tmp_path / "tokenizer.safetensors"
    with torch.no_grad():
        next(network.head.parameters()).fill_(float("nan"))
    save_tokenizer(path, network, mean=MEAN, std=STD)
    with pytest.raises(ConfigError, match=r"head\.\S+ is not finite"):
        load_tokenizer(path)


def official_encoder(state, images, num_blocks=8):
    """DALL-E's encoder from the released names, without `.w`'s module: the paper's residual blocks, written out."""

    def convolve(name, x):
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=weight.shape[-1] // 2)

    x = convolve("blocks.input", images)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, inner = f"blocks.group_{group}.block_{block}", x
            for number in (1, 2, 3, 4):
                inner = convolve(f"{name}.res_path.conv_{number}", inner.relu())
            through = convolve(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
            x = through + inner / num_blocks**2
        if group < 4:
            x = F.max_pool2d(x, 2)
    return convolve("blocks.output.conv", x.relu())


def released_state(hidden=8, num_tokens=7):
    """Random tensors under the names and in the shapes of the released encoder."""
    generator, state = torch.Generator().manual_seed(1), {}

    def add(name, out_dim, in_dim, side):
        state[f"{name}.w"] = torch.randn(out_dim, in_dim, side, side, generator=generator) / (in_dim * side**2) ** 0.5
        state[f"{name}.b"] = torch.randn(out_dim, generator=generator)

    add("blocks.input", hidden, 3, 7)
    dim = hidden
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            out = hidden * 2 ** (group - 1)
            name = f"blocks.group_{group}.block_{block}"
            if dim != out:
                add(f"{name}.id_path", out, dim, 1)
            for number, (o, i, side) in enumerate(
                [(out // 4, dim, 3), (out // 4, out // 4, 3), (out // 4, out // 4, 3), (out, out // 4, 1)], start=1
            ):
                add(f"{name}.res_path.conv_{number}", o, i, side)
            dim = out
    add("blocks.output.conv", num_tokens, dim, 1)
    return state


def converted(state, path: Path, arguments):
    """What the head of modules/tokenizer.py says of DALL-E's encoder."""
    tensors = {}
    for name, tensor in state.items():
        name = name.removesuffix(".w") + ".weight" if name.endswith(".w") else name.removesuffix(".b") + ".bias"
        name = name.replace("blocks.output.conv", "head") if "output" in name else f"encoder.{name}"
        tensors[name] = tensor
    backbone = {"name": "dalle_encoder", "arguments": arguments}
    about = {"backbone": backbone, "num_tokens": 7, "mean": [-0.125] * 3, "std": [1.25] * 3}
    write_tensors(path, tensors, metadata={"tokenizer": json.dumps(about)})
    return path


def test_dalles_released_encoder_is_read_under_the_documented_names(tmp_path):
    state, images = released_state(), torch.rand(2, 3, 32, 24)
    network, mean, std = load_tokenizer(converted(state, tmp_path / "dalle.safetensors", SMALL_DALLE.arguments))
    assert (mean, std) == ((-0.125,) * 3, (1.25,) * 3)
    torch.testing.assert_close(network.eval()(images), official_encoder(state, images))


def test_dalles_encoder_has_its_size():
    with torch.device("meta"):
        network = Tokenizer(create_backbone(BackboneConfig(name="dalle_encoder")), 8192)
    assert sum(p.numel() for p in network.parameters()) == 53_786_240
    assert network.stride == 8


def test_the_decoder_paints_every_pixel():
    decoder = TokenDecoder(5, 8, channels=6, first_dim=4, hidden_dim=8, blocks_per_group=2)
    assert decoder(torch.randn(2, 5, 3, 2)).shape == (2, 6, 24, 16)
    widths = [decoder.blocks[group][0].res_path.conv_4.out_channels for group in range(1, 5)]
    assert widths == [64, 32, 16, 8]


def test_dalles_decoder_has_its_size():
    with torch.device("meta"):
        decoder = TokenDecoder(8192, 8, channels=6, first_dim=128, hidden_dim=256, blocks_per_group=2)
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766


def test_a_stride_that_cannot_be_doubled_to_is_refused():
    with pytest.raises(ConfigError, match=r"power of two pixels.* Got 6\.$"):
        TokenDecoder(5, 6, channels=3, first_dim=4, hidden_dim=8, blocks_per_group=1)


@pytest.mark.parametrize("damage", ["none", "bytes", "no header", "a tensor less"])
def test_what_is_no_tokenizer_is_told_in_one_sentence(damage, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    if damage == "bytes":
        path.write_bytes(b"no tensors")
    elif damage == "no header":
        write_tensors(path, {"head.weight": torch.ones(1)})
    elif damage == "a tensor less":
        state = released_state()
        del state["blocks.group_2.block_1.id_path.b"]
        converted(state, path, SMALL_DALLE.arguments)
    with pytest.raises(
        ConfigError, match="There is no tokenizer" if damage == "none" else "is not a tokenizer"
    ) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    assert "KeyError" not in str(error.value)

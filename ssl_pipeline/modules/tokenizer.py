"""Images as discrete codes: the encoder of a discrete VAE with its file, and the decoder that paints from codes.

A tokenizer's file is safetensors with the tensors

    encoder.*                  under the names of the timm model that it is
    head.weight, head.bias     (num_tokens, D, 1, 1) and (num_tokens,): a 1x1 convolution from its map to the codes

and in the header, under the key `tokenizer`, a line of JSON:

    {"backbone": {"name": ..., "arguments": {...}}, "num_tokens": ..., "mean": [r, g, b], "std": [r, g, b]}

DALL-E's released encoder becomes one with the backbone {"name": "dalle_encoder", "arguments": {}}, num_tokens 8192,
mean -0.125 and std 1.25 for each colour (they make 0.8 * pixel + 0.1) by renaming its tensors, for G = 1 ... 4,
B = 1, 2, C = 1 ... 4:

    blocks.input.w                           -> encoder.blocks.input.weight
    blocks.group_G.block_B.id_path.w         -> encoder.blocks.group_G.block_B.id_path.weight     (G = 2, 3, 4; B = 1)
    blocks.group_G.block_B.res_path.conv_C.w -> encoder.blocks.group_G.block_B.res_path.conv_C.weight
    blocks.output.conv.w                     -> head.weight
    and each .b                              -> .bias
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssl_pipeline.backbones import ARCHITECTURE, Backbone, BackboneConfig, create_backbone
from ssl_pipeline.backbones.dalle_encoder import ResidualBlock, initialise_convolutions
from ssl_pipeline.backbones.weights import require_floats
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.files import JSON, write_tensors

FILE_NAME = "tokenizer.safetensors"
TRAIN = f"Train one: method.name=dvae writes {FILE_NAME}."
PROBE = 128  # pixels: any size that strides divide
Channels = tuple[float, float, float]


class Tokenizer(nn.Module):
    """An encoder and a 1x1 convolution from its map to codes: images (N, 3, H, W) -> logits (N, K, rows, columns)."""

    def __init__(self, encoder: Backbone, num_tokens: int) -> None:
        super().__init__()
        dim, (rows, _) = encoder.map_shape(PROBE)
        self.encoder, self.num_tokens = encoder, num_tokens
        self.stride = PROBE // rows
        """Side in pixels of what a code stands for."""
        self.head = nn.Conv2d(dim, num_tokens, kernel_size=1)
        initialise_convolutions(self.head)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D), what the encoder says of an image, and the logits."""
        features, its_map = self.encoder.features_and_map(images)
        return features, self.head(its_map)

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[1]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> the most likely codes (N, L) int64, row by row."""
        return self(images).argmax(dim=1).flatten(1)


class TokenDecoder(nn.Module):
    """DALL-E's decoder: a mixture of codes (N, K, rows, columns) -> (N, channels, rows * stride, columns * stride).

    hidden_dim: width of the last group of blocks; each one before it is twice as wide. Raises ConfigError unless
    `stride` is a power of two, by which the groups double the map.
    """

    def __init__(
        self, num_tokens: int, stride: int, *, channels: int, first_dim: int, hidden_dim: int, blocks_per_group: int
    ) -> None:
        super().__init__()
        num_doublings = stride.bit_length() - 1
        if stride != 2**num_doublings:
            raise ConfigError(f"a code must stand for a power of two pixels, for the decoder to double. Got {stride}.")
        num_blocks, in_dim = (num_doublings + 1) * blocks_per_group, first_dim
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(num_tokens, first_dim, 1))
        for group in range(num_doublings + 1):
            dim = hidden_dim * 2 ** (num_doublings - group)
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(blocks_per_group):
                blocks[f"block_{number + 1}"] = ResidualBlock(in_dim, dim, kernels=(1, 3, 3, 3), num_blocks=num_blocks)
                in_dim = dim
            if group < num_doublings:
                blocks["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            parts[f"group_{group + 1}"] = nn.Sequential(blocks)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(in_dim, channels, 1)))
        self.blocks = nn.Sequential(parts)
        initialise_convolutions(self)

    def forward(self, mixtures_NKRC: Tensor) -> Tensor:
        return self.blocks(mixtures_NKRC)


def save_tokenizer(path: Path, tokenizer: Tokenizer, *, mean: Channels, std: Channels) -> None:
    """Write a tokenizer and the normalisation of the images that it was trained on."""
    of_encoder = {f"encoder.{name}": tensor for name, tensor in tokenizer.encoder.model.state_dict().items()}
    of_head = {f"head.{name}": tensor for name, tensor in tokenizer.head.state_dict().items()}
    about: dict[str, JSON] = {
        "backbone": tokenizer.encoder.config.model_dump(mode="json", include=set(ARCHITECTURE)),
        "num_tokens": tokenizer.num_tokens,
        "mean": mean,
        "std": std,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in {**of_encoder, **of_head}.items()}
    write_tensors(path, state, metadata={"format": "pt", "tokenizer": json.dumps(about)})


def load_tokenizer(path: Path) -> tuple[Tokenizer, Channels, Channels]:
    """The tokenizer of a file, with mean and std of its images; ConfigError if the file is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            header = file.metadata() or {}
        if "tokenizer" not in header:
            raise ConfigError(f"{path} is not a tokenizer: its tensors do not describe one. {TRAIN}")
        about = json.loads(header["tokenizer"])
        encoder = create_backbone(validate(BackboneConfig, about["backbone"]))
        tokenizer = Tokenizer(encoder, int(about["num_tokens"]))
        red, green, blue = map(float, about["mean"])
        std_red, std_green, std_blue = map(float, about["std"])
        tokenizer.encoder.model.load_state_dict(_under(state, "encoder."))
        tokenizer.head.load_state_dict(_under(state, "head."))
        counters = "num_batches_tracked"
        require_floats((item for item in state.items() if not item[0].endswith(counters)), source=str(path))
    except FileNotFoundError:
        raise ConfigError(f"There is no tokenizer {path}. {TRAIN}") from None
    except ConfigError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is not a tokenizer ({type(error).__name__}: {reason}).") from None
    return tokenizer, (red, green, blue), (std_red, std_green, std_blue)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

"""BEiT (Bao et al., 2021, https://arxiv.org/abs/2106.08254)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ssl_pipeline.backbones import Backbone, require_tokens
from ssl_pipeline.backbones.initialisation import initialise_within_a_deviation
from ssl_pipeline.batch import Batch, MaskRule, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError, MayChange
from ssl_pipeline.losses import masked_token_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.teacher import Snapshot
from ssl_pipeline.modules.tokenizer import Tokenizer, load_tokenizer
from ssl_pipeline.optim.rules import ParamRule, untouched_by_decay
from ssl_pipeline.schedule import Progress


class BEiTConfig(Config):
    """BEiT: a ViT sees an image with blocks masked, and predicts the codes that a tokenizer gives these patches."""

    name: Literal["beit"]
    tokenizer: MayChange[Path]  # to another place of the same bytes: its Snapshot looks at these
    """The tokenizer's file: tokenizer.safetensors of a run of dvae, or DALL-E's encoder under the names that
    `ssl_pipeline/modules/tokenizer.py` lists."""
    num_tokens: int = Field(8192, gt=1)
    """How many codes the tokenizer has."""
    num_masked: int = Field(75, gt=0)
    """How many patches of an image are masked, or a few fewer (official: 75 of 196)."""
    min_block: int = Field(16, ge=1)
    """Smallest area of a masked block in patches."""
    max_block: int | None = Field(None, ge=1)
    """Largest area of a masked block in patches; null: no bound."""
    min_aspect: float = Field(0.3, gt=0, le=1)
    """Smallest height / width of a masked block; the largest is 1 / this."""
    exact_number: bool = False
    """Whether random patches fill up what the blocks leave of num_masked (BEiT v2)."""


class BEiT(Method):
    """An encoder whose masked patches are a learnt token, and a linear layer from these to codes.

    The tokenizer is frozen, is read by `prepare`, and sees the same crop in the group `tokens`, a code for each patch.
    The official ViT has `initial_weights: beit`.
    """

    config_class = BEiTConfig
    reads_class_token = False

    tokenizer: Snapshot[Tokenizer]

    def __init__(self, config: BEiTConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.encoder = require_tokens(backbone, "BEiT", no_pooling=True)
        if self.encoder.stride != self.encoder.patch_size:
            raise ConfigError(f"BEiT needs a token for each patch. '{backbone.name}' merges its patches; try a ViT.")
        mask = MaskRule(
            "blocks",
            self.encoder.patch_size,
            num_masked=config.num_masked,
            min_block=config.min_block,
            max_block=config.max_block,
            min_aspect=config.min_aspect,
            exact=config.exact_number,
        )
        self.needs = (Views("image", mask=mask), Views("tokens", crops_of="image", for_backbone=False))
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.head = nn.Linear(backbone.embed_dim, config.num_tokens)
        initialise_within_a_deviation(self.head)

    def prepare(self, facts: RunFacts) -> None:
        path = self.config.tokenizer
        tokenizer, mean, std = load_tokenizer(path)
        if tokenizer.num_tokens != self.config.num_tokens:
            raise ConfigError(
                f"method.num_tokens must be the number of codes of {path}, {tokenizer.num_tokens}. "
                f"Got {self.config.num_tokens}."
            )
        sizes, token_sizes = facts.view_sizes["image"], facts.view_sizes["tokens"]
        needed = tuple(size // self.encoder.patch_size * tokenizer.stride for size in sizes)
        if token_sizes != needed:
            raise ConfigError(
                f"augment.tokens.size must be {_numbers(needed)} for images of {_numbers(sizes)} pixels: patches of "
                f"{self.encoder.patch_size}, and codes of {tokenizer.stride} pixels in {path}. "
                f"Got {_numbers(token_sizes)}."
            )
        for size in sizes:
            num_patches = (size // self.encoder.patch_size) ** 2
            if self.config.num_masked >= num_patches:
                raise ConfigError(
                    f"method.num_masked must be below the {num_patches} patches of an image of {size} pixels. "
                    f"Got {self.config.num_masked}."
                )
            self.encoder.require_size(size, group="image")
        facts.require_normalisation("tokens", mean, std, why=f"The tokenizer {path} was trained on")
        self.tokenizer = Snapshot(tokenizer, source=path)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images, mask_NL = batch.views["image"].flatten(0, 1), batch.masks["image"].flatten(0, 1)
        places_M = batch.masked_patches("image")
        codes_NL = self.tokenizer.network.tokens(batch.views["tokens"].flatten(0, 1))
        tokens = self.encoder.tokens(images, mask=mask_NL, mask_token=self.mask_token)
        logits_MK = self.head(tokens.patches.flatten(0, 1).index_select(0, places_M))
        loss, right = masked_token_loss(logits_MK, codes_NL.flatten().index_select(0, places_M))
        return StepOutput(
            loss, {"token_accuracy": right, "feature_std": feature_std(self.encoder.pool(tokens).detach(), progress)}
        )

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder}

    def parts_to_compile(self) -> list[nn.Module]:
        return [self.encoder, self.tokenizer.network]

    def param_rules(self) -> tuple[ParamRule, ...]:
        return untouched_by_decay(self, "encoder.")


def _numbers(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))

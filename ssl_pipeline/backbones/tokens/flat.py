"""What networks share whose blocks all see one row of tokens: class token, registers, patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import checkpoint
from torch import Tensor, nn

from ssl_pipeline.backbones.patches import take_patches
from ssl_pipeline.backbones.positions import Grid, is_antialiased, resample_positions
from ssl_pipeline.backbones.tokens.base import TimmModel, TokenAdapter, Tokens, embed_whole, patch_side

# Axes: N images, R rows and C columns of patches, L = R * C patches row by row, P prefix tokens (class token, then
# registers), T = P + L, D dimensions.


class FlatAdapter(TokenAdapter):
    """A position table that is added to the patches, if any; prefix tokens; blocks in a row; a final norm."""

    rotates = False
    """Whether attention needs the position of each token."""

    def __init__(self, model: TimmModel) -> None:
        super().__init__(model)
        self.patch_size = self.stride = patch_side(model.patch_embed)
        self.patch_dim = model.embed_dim
        self.grid = model.patch_embed.grid_size
        self.num_blocks = len(model.blocks)
        self.num_prefix_tokens = model.num_prefix_tokens
        self._antialias = is_antialiased(model)
        self.takes_some_patches = type(model.patch_embed) is PatchEmbed  # convolutions before it need the neighbours
        # position entries that belong to the class token and the registers
        self._num_prefix_positions = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens

    @abstractmethod
    def prepare(self, tokens_NTD: Tensor) -> Tensor:
        """What happens to the tokens between their positions and the first block."""

    @abstractmethod
    def block_arguments(self, grid: Grid, places_NK: Tensor | None) -> Sequence[Mapping[str, Tensor | None]]:
        """What each block is given besides the tokens, for K patches at `places_NK`, or all of the grid."""

    def patches(self, images: Tensor) -> Tensor:
        return embed_whole(self.model.patch_embed, images)

    def embed(self, patches_NRCD: Tensor) -> Tensor:
        """Embedded patches -> (N, L, D), with their positions."""
        grid: Grid = (patches_NRCD.shape[1], patches_NRCD.shape[2])
        tokens = patches_NRCD.flatten(1, 2)
        if self.model.pos_embed is None:
            return tokens
        return tokens + resample_positions(self._patch_positions(), self.grid, grid, antialias=self._antialias)

    def embed_some(self, pixels_NKE: Tensor, places_NK: Tensor) -> Tensor:
        """Pixels of some patches of images of the network's own size -> (N, K, D), with their positions."""
        projection = self.model.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # pixels in the order row, column, channel
        tokens = self.model.patch_embed.norm(F.linear(pixels_NKE, weight, projection.bias))
        if self.model.pos_embed is None:
            return tokens
        return tokens + take_patches(self._patch_positions().expand(len(pixels_NKE), -1, -1), places_NK)

    def blocks(
        self, tokens_NTD: Tensor, arguments: Sequence[Mapping[str, Tensor | None]], layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens after the last block, and after each of `layers`."""
        checkpointed = self.model.grad_checkpointing and torch.is_grad_enabled()
        kept: dict[int, Tensor] = {}
        for number, (block, given) in enumerate(zip(self.model.blocks, arguments, strict=True)):
            informed = partial(block, **given)
            tokens_NTD = checkpoint(informed, tokens_NTD) if checkpointed else informed(tokens_NTD)
            if number in layers:
                kept[number] = tokens_NTD
        return tokens_NTD, kept

    def through(
        self, tokens_NLD: Tensor, grid: Grid, *, places_NK: Tensor | None = None, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Patches with their positions -> all tokens (N, T, D) after the final norm, and those of `layers`."""
        tokens = self.prepare(self._with_prefix(tokens_NLD))
        tokens, kept = self.blocks(tokens, self.block_arguments(grid, places_NK), layers)
        return self.model.norm(tokens), {number: self.model.norm(inner) for number, inner in kept.items()}

    def encode(self, patches_NRCD: Tensor, layers: Sequence[int]) -> Tokens:
        if any(not -self.num_blocks <= layer < self.num_blocks for layer in layers):
            raise ValueError(f"layers must be numbers of the {self.num_blocks} blocks, from 0. Got {tuple(layers)}.")
        numbers = [layer % self.num_blocks for layer in layers]
        grid: Grid = (patches_NRCD.shape[1], patches_NRCD.shape[2])
        tokens, kept = self.through(self.embed(patches_NRCD), grid, layers=numbers)
        return self._split(tokens, grid, tuple(self._split(kept[number], grid) for number in numbers))

    def features(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        tokens, _ = self.through(self.embed(patches), (patches.shape[1], patches.shape[2]))
        return self.model.forward_head(tokens, pre_logits=True)

    def pool(self, tokens: Tokens) -> Tensor:
        prefix = [] if tokens.cls is None else [tokens.cls[:, None]]
        return self.model.forward_head(torch.cat([*prefix, tokens.registers, tokens.patches], dim=1), pre_logits=True)

    def parts_to_compile(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def _patch_positions(self) -> Tensor:
        return self.model.pos_embed[:, self._num_prefix_positions :]

    def _with_prefix(self, tokens_NLD: Tensor) -> Tensor:
        model = self.model
        prefix = [token for token in (model.cls_token, getattr(model, "reg_token", None)) if token is not None]
        if not prefix:
            return tokens_NLD
        prefix_tokens = torch.cat(prefix, dim=1)
        if self._num_prefix_positions and model.pos_embed is not None:
            prefix_tokens = prefix_tokens + model.pos_embed[:, : self._num_prefix_positions]
        return torch.cat([prefix_tokens.expand(len(tokens_NLD), -1, -1), tokens_NLD], dim=1)

    def _split(self, tokens_NTD: Tensor, grid: Grid, layers: tuple[Tokens, ...] = ()) -> Tokens:
        num_cls = int(self.model.cls_token is not None)
        registers, patches = tokens_NTD[:, num_cls : self.num_prefix_tokens], tokens_NTD[:, self.num_prefix_tokens :]
        if patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"tokens need all {grid[0] * grid[1]} patches, and this network left {patches.shape[1]} of them. "
                "Leave backbone.arguments.patch_drop_rate out."
            )
        return Tokens(tokens_NTD[:, 0] if num_cls else None, registers, patches, grid, layers)

"""A timm model as a backbone: its features, and for a ViT its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_seq
from torch import Tensor, nn

from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.backbones.config import BackboneConfig
from ssl_pipeline.backbones.patches import take_patches
from ssl_pipeline.backbones.positions import Grid, resample_positions


class Backbone(nn.Module):
    """A timm model without its classifier: images (B, C, H, W) -> features (B, embed_dim)."""

    config: BackboneConfig
    """What `create_backbone` made it from, and makes another one from."""
    forward_methods: ClassVar[tuple[str, ...]] = ()
    """What is called besides `forward`; for those who must know when its weights are needed (FSDP2)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.embed_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        # the layout of `create_backbone`: convolutions take a third of the time on CPUs, and less on GPUs too
        return self.model(images.contiguous(memory_format=torch.channels_last))


class TokenBackbone(Backbone):
    """A timm ViT, at any image size, that can also be entered and left at its tokens.

    The position table is learnt for `grid` patches and resampled for images of another size as DINO does it.
    """

    model: VisionTransformer
    forward_methods = ("embed", "embed_patches", "encode")

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.grid: Grid = model.patch_embed.grid_size
        self.num_prefix_tokens: int = model.num_prefix_tokens
        # position entries that belong to the class token and the registers
        self._num_prefix_positions = 0 if model.no_embed_class else model.num_prefix_tokens

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> patch tokens with their positions (N, L, embed_dim), row by row."""
        height, width = images.shape[-2:]
        if (height % self.patch_size or width % self.patch_size) and not self.model.patch_embed.dynamic_img_pad:
            raise ValueError(
                f"image sides must be multiples of the patch size {self.patch_size}. Got {height}x{width}."
            )
        tokens = self.model.patch_embed(images)  # (N, rows, columns, D)
        rows, columns = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        if self.model.pos_embed is None:
            return tokens
        positions = self.model.pos_embed[:, self._num_prefix_positions :]
        return tokens + resample_positions(positions, self.grid, (rows, columns))

    def embed_patches(self, patches: Tensor, places: Tensor) -> Tensor:
        """Some patches (N, K, p * p * C) of images of the backbone's own size -> their tokens (N, K, embed_dim).

        patches: pixels in the order of `patchify`. places: (N, K), where in its image each patch is, counted by rows.
        The tokens are those of `embed`.
        """
        projection = self.model.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # pixels in the order row, column, channel
        tokens = self.model.patch_embed.norm(F.linear(patches, weight, projection.bias))
        if self.model.pos_embed is None:
            return tokens
        positions = self.model.pos_embed[:, self._num_prefix_positions :]
        return tokens + take_patches(positions.expand(len(patches), -1, -1), places)

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens (N, L, D), all or some of them -> encoded and normalised (N, 1 + L, D), class token first.

        A model with registers puts them after the class token, one without class token leaves it out: there are
        `num_prefix_tokens` before the patches.
        """
        model = self.model
        prefix: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if prefix:
            prefix_tokens = torch.cat(prefix, dim=1)
            if self._num_prefix_positions and model.pos_embed is not None:
                prefix_tokens = prefix_tokens + model.pos_embed[:, : self._num_prefix_positions]
            tokens = torch.cat([prefix_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = model.norm_pre(model.patch_drop(model.pos_drop(tokens)))
        choose_attention(model.blocks, tokens)
        if model.grad_checkpointing and torch.is_grad_enabled():
            return model.norm(checkpoint_seq(model.blocks, tokens))
        return model.norm(model.blocks(tokens))

    def compile(
        self,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        """As `torch.nn.Module.compile`; also for those who enter and leave at the tokens."""
        super().compile(fullgraph=fullgraph, dynamic=dynamic, backend=backend)
        self.model.blocks.compile(fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.encode(self.embed(images)), pre_logits=True)


def without_drop_path(module: nn.Module) -> None:
    """Switch stochastic depth off for good, as a teacher needs it."""
    for part in module.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0

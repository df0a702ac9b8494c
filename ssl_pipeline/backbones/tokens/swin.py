"""timm's SwinTransformer: patches of 4 pixels that are merged on the way, so that a token covers more than one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssl_pipeline.backbones.tokens.base import TimmModel, TokenAdapter, Tokens, embed_whole


class SwinAdapter(TokenAdapter):
    """A mask is about the small patches; the tokens are those of the last stage."""

    compiles_for_any_size = False  # two minutes for a toy of three stages, in which sizes are symbols

    def __init__(self, model: TimmModel) -> None:
        super().__init__(model)
        self.patch_size = model.patch_embed.patch_size[0]
        self.patch_dim = model.embed_dim
        self.grid = model.patch_embed.grid_size
        self.stride = model.feature_info[-1]["reduction"]
        self.num_blocks = sum(len(stage.blocks) for stage in model.layers)
        self.num_prefix_tokens = 0
        self.takes_some_patches = False

    def patches(self, images: Tensor) -> Tensor:
        return embed_whole(self.model.patch_embed, images)

    def encode(self, patches_NRCD: Tensor, layers: Sequence[int]) -> Tokens:
        if layers:
            raise ValueError(
                f"layers must be empty for a Swin, whose blocks have maps of different sizes. Got {tuple(layers)}."
            )
        encoded = self._through(patches_NRCD)
        patches = encoded.flatten(1, 2)
        return Tokens(None, patches[:, :0], patches, (encoded.shape[1], encoded.shape[2]))

    def features(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self._through(self.patches(images)), pre_logits=True)

    def pool(self, tokens: Tokens) -> Tensor:
        return self.model.forward_head(tokens.patches.unflatten(1, tokens.grid), pre_logits=True)

    def parts_to_compile(self) -> list[nn.Module]:
        return [self.model.layers]

    def _through(self, patches_NRCD: Tensor) -> Tensor:
        return self.model.norm(self.model.layers(patches_NRCD))

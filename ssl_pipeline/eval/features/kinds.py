"""What is kept of each image: the network's features, its class token, those of inner blocks, its patch tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, TokenBackbone, Tokens
from ssl_pipeline.backbones.tokens import NETWORKS_WITH_TOKENS
from ssl_pipeline.config import ConfigError

Kind = Literal["pooled", "class", "mean", "blocks", "patches", "map"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Axes: B images, L patches row by row, D dimensions, n blocks.


class FeatureKinds(nn.Module):
    """Images (B, 3, S, S) -> one float32 tensor for each kind that is wanted, all from one forward pass.

    pooled   (B, D), what the network's own forward gives
    class    (B, D), the class token after the final norm
    mean     (B, D), the mean of the patch tokens after the final norm
    blocks   (B, n * D), the class tokens of the last n blocks, each after the final norm, one after the other (the
             linear evaluation of DINO takes n = 4); patch means where the network has no class token
    patches  (B, L, D), the patch tokens after the final norm
    map      (B, L, D), the same, or of a network without tokens the places of its last map of features, row by row

    Raises ConfigError if the network does not have what is wanted.
    """

    def __init__(self, network: nn.Module, kinds: tuple[Kind, ...] = ("pooled",), *, last_blocks: int = 4) -> None:
        super().__init__()
        self.network, self.kinds, self.last_blocks = network, kinds, last_blocks
        if "map" in kinds and not isinstance(network, Backbone):
            raise ConfigError(
                "kind=map needs the patch tokens of a ViT or the last map of a CNN. Raw pixels have none."
            )
        of_tokens = [kind for kind in kinds if kind not in ("pooled", "map")]
        if not of_tokens:
            return
        name = getattr(network, "name", type(network).__name__)
        if not isinstance(network, TokenBackbone):
            raise ConfigError(
                f"kind={of_tokens[0]} needs a network with tokens. '{name}' has none; take kind=pooled. Networks with "
                f"tokens: {NETWORKS_WITH_TOKENS}."
            )
        if "class" in kinds and not has_class_token(network):
            raise ConfigError(f"kind=class needs a class token. '{name}' has none; take kind=pooled.")
        if "blocks" in kinds and last_blocks > network.num_blocks:
            raise ConfigError(
                f"last_blocks={last_blocks} is more than '{name}' has. Take at most {network.num_blocks}."
            )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.kinds == ("pooled",):
            return {"pooled": self.network(images).float()}
        if not isinstance(self.network, TokenBackbone):
            assert isinstance(self.network, Backbone)
            pooled, its_map = self.network.features_and_map(images)
            found = {"pooled": pooled, "map": its_map.flatten(2).mT}
            return {kind: found[kind].float() for kind in self.kinds}
        blocks = self.last_blocks if "blocks" in self.kinds else 0
        deepest = max(blocks, len(self.network.feature_layers) if "pooled" in self.kinds else 0)
        tokens = self.network.tokens(images, layers=range(-deepest, 0))
        return {kind: self._of(kind, tokens).float() for kind in self.kinds}

    def _of(self, kind: Kind, tokens: Tokens) -> Tensor:
        if kind in ("patches", "map"):
            return tokens.patches
        if kind == "blocks":
            return torch.cat([_class_or_mean(of_block) for of_block in tokens.layers[-self.last_blocks :]], dim=1)
        if kind == "mean":
            return tokens.patches.mean(dim=1)
        if kind == "class":
            return _class_or_mean(tokens)
        assert isinstance(self.network, TokenBackbone)
        return self.network.pool(tokens)


def has_class_token(network: TokenBackbone) -> bool:
    return getattr(network.model, "cls_token", None) is not None


def _class_or_mean(tokens: Tokens) -> Tensor:
    return tokens.cls if tokens.cls is not None else tokens.patches.mean(dim=1)

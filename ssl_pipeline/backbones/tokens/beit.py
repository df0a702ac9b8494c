"""timm's Beit: BEiT and BEiT v2, with biases in attention for the distance of two patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ssl_pipeline.backbones.positions import Grid
from ssl_pipeline.backbones.tokens.base import TimmModel
from ssl_pipeline.backbones.tokens.flat import FlatAdapter


class BeitAdapter(FlatAdapter):
    """Images of the network's own size; the biases, of each block or shared by all, need all patches."""

    def __init__(self, model: TimmModel) -> None:
        super().__init__(model)
        of_blocks = any(block.attn.relative_position_bias_table is not None for block in model.blocks)
        self.takes_some_patches = model.rel_pos_bias is None and not of_blocks

    def prepare(self, tokens_NTD: Tensor) -> Tensor:
        return self.model.pos_drop(tokens_NTD)

    def block_arguments(self, grid: Grid, places_NK: Tensor | None) -> Sequence[Mapping[str, Tensor | None]]:
        shared = self.model.rel_pos_bias() if self.model.rel_pos_bias is not None else None
        return [{"shared_rel_pos_bias": shared}] * self.num_blocks

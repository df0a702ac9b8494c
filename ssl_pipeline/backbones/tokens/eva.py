"""timm's Eva: DINOv3's ViTs, EVA and EVA-02, the Perception Encoder, RoPE-ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssl_pipeline.backbones.positions import Grid
from ssl_pipeline.backbones.tokens.base import TimmModel
from ssl_pipeline.backbones.tokens.flat import FlatAdapter


class EvaAdapter(FlatAdapter):
    """Patches are rotated in attention by where they are (RoPE), in addition to or instead of a position table."""

    def __init__(self, model: TimmModel) -> None:
        super().__init__(model)
        self.rotates = model.rope is not None
        self._rotations: dict[tuple[Grid, torch.device, torch.dtype], Tensor] = {}

    def prepare(self, tokens_NTD: Tensor) -> Tensor:
        return self.model.norm_pre(self.model.pos_drop(tokens_NTD))

    def block_arguments(self, grid: Grid, places_NK: Tensor | None) -> Sequence[Mapping[str, Tensor | None]]:
        if self.model.rope is None:
            return [{}] * self.num_blocks
        rotations = self._rotations_of(grid)  # (L, E) for all blocks, or (blocks, heads, L, E)
        if not getattr(self.model, "rope_mixed", False):
            chosen = rotations if places_NK is None else rotations[places_NK][:, None]  # (N, any head, K, E)
            return [{"rope": chosen}] * self.num_blocks
        if places_NK is None:
            return [{"rope": rotations_HLE} for rotations_HLE in rotations]
        return [{"rope": rotations_HLE[:, places_NK].transpose(0, 1)} for rotations_HLE in rotations]

    def _rotations_of(self, grid: Grid) -> Tensor:
        """timm's sines and cosines for a grid; those that never change are made once.

        timm makes them on the CPU, and each copy to a GPU would wait for it.
        """
        rope = self.model.rope
        changes = any(True for _ in rope.parameters()) or (rope.training and getattr(rope, "aug_active", False))
        buffer = next(rope.buffers(), None)
        if changes or buffer is None or torch.compiler.is_compiling():
            return rope.get_embed(shape=grid)
        key = (grid, buffer.device, buffer.dtype)
        if key not in self._rotations:
            with torch.inference_mode(False):  # an evaluation may be the first to ask, a training step the next
                self._rotations[key] = rope.get_embed(shape=grid)
        return self._rotations[key]

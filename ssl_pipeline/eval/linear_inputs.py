"""Which features of a ViT a linear classifier may get (DINOv2, Oquab et al., 2023, https://arxiv.org/abs/2304.07193)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.eval.features.kinds import Kind
from ssl_pipeline.eval.protocol import LabelledFeatures

TOKEN_KINDS: tuple[Kind, ...] = ("blocks", "mean")

# Axes: N images, D dimensions, n blocks.


def inputs_of(features: LabelledFeatures) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs of a classifier by name, of training and test images.

    Only `pooled`, or where TOKEN_KINDS are there what DINOv2 sweeps: `class 1` (N, D), the last block's class token,
    `class 4` (N, n D), those of the last n = 4 blocks, and both with the mean of the patches of the last block
    appended, `class 1 + mean` and `class 4 + mean`.
    """
    if not features.of_kinds:
        return {"pooled": (features.train, features.test)}
    train, test = (token_inputs(*(features.of_kinds[kind][place] for kind in TOKEN_KINDS)) for place in (0, 1))
    return {name: (train[name], test[name]) for name in train}


def token_inputs(blocks_NnD: Tensor, mean_ND: Tensor) -> dict[str, Tensor]:
    """Class tokens of the last n blocks, one after the other (N, n * D), and patch means -> each input by its name."""
    last_ND = blocks_NnD[:, -mean_ND.shape[1] :]
    num_blocks = blocks_NnD.shape[1] // mean_ND.shape[1]
    alone = {"class 1": last_ND, f"class {num_blocks}": blocks_NnD}
    return {
        f"{name}{' + mean' if with_mean else ''}": torch.cat((tokens, mean_ND), dim=1) if with_mean else tokens
        for with_mean in (False, True)
        for name, tokens in alone.items()
    }

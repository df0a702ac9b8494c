"""Reversible ViT (Mangalam et al., 2022, https://arxiv.org/abs/2302.04869): activations are computed from outputs.

Two streams of tokens, both the embedded tokens at first, go through the blocks of a timm VisionTransformer:

    y1 = x1 + attention(norm1(x2))        x2 = y2 - mlp(norm2(y1))
    y2 = x2 + mlp(norm2(y1))              x1 = y1 - attention(norm1(x2))

and their mean leaves them (the paper's networks for classification put both side by side, which would double the width
of the features). The equations on the right give a block's inputs back, so the backward pass needs only the outputs of
the last block, and memory does not grow with depth; it computes each block twice, as activation checkpointing does.
Parameters have the names of timm's network, and are those of another function: `MARK` among its tensors keeps one from
being loaded as the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.config import ConfigError

MARK = "two_streams"
Branch = Callable[[Tensor], Tensor]


def mark_reversible(model: nn.Module, name: str) -> None:
    """Let the blocks of a timm VisionTransformer have two streams; ConfigError for blocks of another kind."""
    blocks = getattr(model, "blocks", ())
    if not blocks or any(type(block) is not Block for block in blocks):
        raise ConfigError(
            f"backbone.reversible works only with the blocks of timm's VisionTransformer (vit_*, deit_*). '{name}' has "
            "none."
        )
    model.register_buffer(MARK, torch.tensor(True))


def is_reversible(model: nn.Module) -> bool:
    """Whether the blocks of a timm model have two streams."""
    return hasattr(model, MARK)


@torch.compiler.disable
def through_two_streams(
    blocks: Sequence[Block], tokens_NTD: Tensor, layers: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """The mean of both streams after the last block, and after each of `layers` (which are kept then: no reversal)."""
    choose_attention(blocks, tokens_NTD)
    seeds = torch.randint(2**62, (len(blocks),)).tolist() if _draws(blocks) else None
    if layers or not torch.is_grad_enabled():
        return streams_kept(blocks, tokens_NTD, seeds, layers)
    parameters = [parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad]
    return _Reversible.apply(blocks, seeds, tokens_NTD, *parameters), {}


def streams_kept(
    blocks: Sequence[Block], tokens_NTD: Tensor, seeds: Sequence[int] | None, layers: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """The same as autograd sees it: whatever the blocks compute is kept for the backward pass."""
    first, second = tokens_NTD, tokens_NTD
    kept: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        first, second = _forward(block, first, second, _seed(seeds, number))
        if number in layers:
            kept[number] = (first + second) / 2
    return (first + second) / 2, kept


class _Reversible(torch.autograd.Function):
    """`streams_kept`, whose backward pass begins with the streams after the last block."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[Block], seeds: Sequence[int] | None, tokens_NTD: Tensor, *parameters: Tensor
    ) -> Tensor:
        first, second = tokens_NTD, tokens_NTD
        for number, block in enumerate(blocks):
            first, second = _forward(block, first, second, _seed(seeds, number))
        device = tokens_NTD.device.type
        ctx.blocks, ctx.seeds = blocks, seeds
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(first, second)
        return (first + second) / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        of_first = of_second = gradient / 2
        device, dtype, enabled = ctx.autocast
        of_parameters: list[Tensor | None] = []
        for number, block in reversed(list(enumerate(ctx.blocks))):
            attention, mlp = _branches(block)
            seed = _seed(ctx.seeds, number)
            with torch.autocast(device, dtype, enabled=enabled):
                added, through, of_mlp = _differentiate(mlp, first, of_second, block, seed, 1)
                second, of_first = second - added, of_first + through
                added, through, of_attention = _differentiate(attention, second, of_first, block, seed, 0)
                first, of_second = first - added, of_second + through
            own = [parameter for parameter in block.parameters() if parameter.requires_grad]
            of_parameters = [_sum(of_attention[p], of_mlp[p]) for p in own] + of_parameters
        return None, None, of_first + of_second, *of_parameters


def _forward(block: Block, first: Tensor, second: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    attention, mlp = _branches(block)
    with _drawing(seed, 0, first.device):
        first = first + attention(second)
    with _drawing(seed, 1, first.device):
        second = second + mlp(first)
    return first, second


def _branches(block: Block) -> tuple[Branch, Branch]:
    """What a block adds to its tokens: by its attention, and by its MLP."""
    return (
        lambda tokens: block.drop_path1(block.ls1(block.attn(block.norm1(tokens)))),
        lambda tokens: block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))),
    )


def _differentiate(
    branch: Branch, tokens: Tensor, gradient: Tensor, block: Block, seed: int | None, which: int
) -> tuple[Tensor, Tensor, dict[Tensor, Tensor | None]]:
    """branch(tokens), and the gradients of tokens and of the block's parameters (None: no part of the branch)."""
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    tokens = tokens.detach().requires_grad_()
    with torch.enable_grad(), _drawing(seed, which, tokens.device):
        added = branch(tokens)
    through, *of_parameters = torch.autograd.grad(
        added, [tokens, *parameters], gradient.to(added.dtype), allow_unused=True
    )
    return added.detach(), through, dict(zip(parameters, of_parameters, strict=True))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _draws(blocks: Sequence[Block]) -> bool:
    """Whether a pass draws random numbers: drop path or dropout in training."""
    parts = [part for block in blocks for part in block.modules() if part.training]
    return any(
        (isinstance(part, DropPath) and part.drop_prob) or (isinstance(part, nn.Dropout) and part.p) for part in parts
    )


def _seed(seeds: Sequence[int] | None, number: int) -> int | None:
    return None if seeds is None else seeds[number]


@contextmanager
def _drawing(seed: int | None, which: int, device: torch.device) -> Iterator[None]:
    """Draw the same numbers whenever this is entered with the same seed; other draws continue as if nothing had
    happened."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed + which) % 2**63)
        yield

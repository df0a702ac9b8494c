"""The fused kernel, and what is chosen in its place where it is slow."""

import pytest
import torch
from timm.models.vision_transformer import Attention, Block
from torch import nn

from ssl_pipeline.backbones.attention import choose_attention


def chosen(tokens, *blocks):
    choose_attention(blocks, tokens)
    return [block.attn.fused_attn for block in blocks if hasattr(block, "attn")]


def test_half_precision_on_a_cpu_multiplies_step_by_step():
    blocks, tokens = [Block(8, 2), nn.Identity(), Block(8, 2)], torch.ones(1, 3, 8)
    assert chosen(tokens, *blocks) == [True, True]
    assert chosen(tokens.bfloat16(), *blocks) == [False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(tokens, *blocks) == [False, False]
        assert chosen(tokens.double(), *blocks) == [True, True]  # which autocast leaves as it is
    assert chosen(tokens, *blocks) == [True, True]


def test_other_devices_use_the_fused_kernel():
    with torch.device("meta"):
        assert chosen(torch.ones(1, 3, 8, dtype=torch.bfloat16), Block(8, 2)) == [True]


@pytest.mark.parametrize("num_tokens", [1, 37])
def test_both_ways_compute_the_same(num_tokens):
    torch.manual_seed(0)
    attention, tokens = Attention(24, 3, qkv_bias=True), torch.randn(2, num_tokens, 24)
    results = []
    for fused in (True, False):
        attention.fused_attn = fused
        attention.zero_grad()
        outputs = attention(tokens)
        outputs.square().sum().backward()
        results.append([outputs.detach(), *(parameter.grad for parameter in attention.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)

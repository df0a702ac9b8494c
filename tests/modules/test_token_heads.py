"""Heads for class tokens and patches: what they share."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from ssl_pipeline.modules.heads import PrototypeHead, WeightNormLinear
from ssl_pipeline.modules.token_heads import TokenHeads


def head(num_prototypes=5, bottleneck_dim=4):
    return PrototypeHead(6, num_prototypes, hidden_dim=8, bottleneck_dim=bottleneck_dim)


def test_one_head_serves_both():
    heads, tokens = TokenHeads(head()), torch.randn(3, 6)
    of_classes, of_patches = heads.prototypes()
    assert of_classes is of_patches  # made once
    assert_close(heads.class_rows(tokens), heads.patch_rows(tokens))
    assert_close(heads.class_rows(tokens) @ of_classes.T, heads.classes(tokens))
    assert heads.last_layers == ("classes.last_layer.",)


def test_patches_may_have_prototypes_of_their_own_behind_one_mlp():
    heads, tokens = TokenHeads(head(), WeightNormLinear(4, 7, fixed_scale=True)), torch.randn(3, 6)
    assert_close(heads.class_rows(tokens), heads.patch_rows(tokens))
    assert [len(prototypes) for prototypes in heads.prototypes()] == [5, 7]
    assert_close(heads.prototypes()[1].norm(dim=1), torch.ones(7))


def test_patches_may_have_a_head_of_their_own():
    own = head(7, bottleneck_dim=2)
    heads, patches = TokenHeads(head(), own), torch.randn(2, 3, 6)
    assert_close(heads.patch_rows(patches) @ heads.prototypes()[1].T, own(patches))
    assert heads.patch_rows(patches).shape == (2, 3, 2)


def test_the_last_layers_are_all_prototypes_and_nothing_else():
    for patches in (None, head(7), WeightNormLinear(4, 7, fixed_scale=False)):
        heads = TokenHeads(head(), patches)
        frozen = [name for name, _ in heads.named_parameters() if name.startswith(heads.last_layers)]
        assert all(name.split(".")[-1] in ("weight_g", "weight_v") for name in frozen)
        assert len(frozen) == (2 if patches is None else 4)

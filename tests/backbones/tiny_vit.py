"""A ViT that is built in milliseconds, and images for it."""

import torch

from ssl_pipeline.backbones import BackboneConfig, create_backbone

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny_vit(**changes):
    config = BackboneConfig(
        name="vit_tiny_patch16_224", arguments={**TINY_VIT, **changes.pop("arguments", {})}, **changes
    )
    torch.manual_seed(0)
    return create_backbone(config).eval()


def images(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

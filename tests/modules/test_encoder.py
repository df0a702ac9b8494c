from __future__ import annotations

import torch
from torch import nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.modules.encoder import Encoder


class Flat(Backbone):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed_dim = 12

    def forward(self, images):
        return images.flatten(1)


def test_the_head_stands_on_the_features():
    encoder, images = Encoder(Flat(), nn.Linear(12, 5)), torch.randn(4, 3, 2, 2)
    assert torch.equal(encoder(images), encoder.head(images.flatten(1)))
    assert [name for name, _ in encoder.named_children()] == ["backbone", "head"]

"""A backbone with its head: what students, teachers and momentum encoders are."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone

Head = TypeVar("Head", bound=nn.Module)


class Encoder(nn.Module, Generic[Head]):
    """Images (B, C, H, W) -> head(backbone(images)); both parts are typed, for methods that enter between them."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

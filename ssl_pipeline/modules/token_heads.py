"""Prototype heads for class tokens and patches (iBOT, Zhou et al., 2021, https://arxiv.org/abs/2111.07832)."""

from __future__ import annotations

from torch import Tensor, nn

from ssl_pipeline.modules.heads import PrototypeHead, WeightNormLinear


class TokenHeads(nn.Module):
    """What compares class tokens with prototypes, and patches with the same or with prototypes of their own.

    patches: None, one head for both ("shared"); a second PrototypeHead ("separate"); or prototypes of their own behind
        the class head's MLP (iBOT's `shared_head: false`).
    """

    def __init__(self, classes: PrototypeHead, patches: PrototypeHead | WeightNormLinear | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.patches = patches

    def class_rows(self, tokens_ND: Tensor) -> Tensor:
        """Class tokens (N, in_dim) -> rows (N, bottleneck_dim) of unit length."""
        return self.classes.bottleneck(tokens_ND)

    def patch_rows(self, tokens_MD: Tensor) -> Tensor:
        """Patches (M, in_dim) -> rows (M, bottleneck_dim) of unit length."""
        head = self.patches if isinstance(self.patches, PrototypeHead) else self.classes
        return head.bottleneck(tokens_MD)

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """The prototypes of class tokens (K, D), and those of patches; with one head for both the same tensor."""
        of_classes = self.classes.prototypes()
        if isinstance(self.patches, PrototypeHead):
            return of_classes, self.patches.prototypes()
        return of_classes, of_classes if self.patches is None else self.patches.weight

    @property
    def last_layers(self) -> tuple[str, ...]:
        """What the names of the prototypes' parameters begin with."""
        if self.patches is None:
            return ("classes.last_layer.",)
        return "classes.last_layer.", "patches.last_layer." if isinstance(self.patches, PrototypeHead) else "patches."

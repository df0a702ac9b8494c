"""Prototype heads for class tokens and patches (iBOT, Zhou et al., 2021, https://arxiv.org/abs/2111.07832)."""

from __future__ import annotations

from torch import Tensor, nn

from ssl_pipeline.modules.heads import PrototypeHead, WeightNormLinear
from ssl_pipeline.modules.token_distillation_config import TokenDistillationConfig


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


def token_heads(
    config: TokenDistillationConfig,
    in_dim: int,
    *,
    shared: bool = False,
    patch_layers: int | None = None,
    fixed_scale: bool = True,
    weight_norm: bool = True,
) -> TokenHeads:
    """The heads of DINOv2 and DINOv3: one for class tokens, and one for patches unless it is `shared`.

    patch_layers: linear layers of the patch head; None: as the class head's. fixed_scale, weight_norm: of the
    prototypes, as in PrototypeHead.
    """
    classes = PrototypeHead(
        in_dim,
        config.num_prototypes,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        num_layers=config.head_layers,
        fixed_scale=fixed_scale,
        weight_norm=weight_norm,
    )
    if shared:
        return TokenHeads(classes)
    patches = PrototypeHead(
        in_dim,
        config.num_patch_prototypes or config.num_prototypes,
        hidden_dim=config.patch_head_hidden or config.head_hidden_dim,
        bottleneck_dim=config.patch_head_bottleneck or config.head_bottleneck_dim,
        num_layers=patch_layers or config.head_layers,
        fixed_scale=fixed_scale,
        weight_norm=weight_norm,
    )
    return TokenHeads(classes, patches)

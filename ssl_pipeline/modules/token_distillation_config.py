"""The settings that DINOv2 and DINOv3 have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssl_pipeline.config import Config, Depth, InRange, Width
from ssl_pipeline.schedule import Duration


class TokenDistillationConfig(Config):
    """Heads, weights and masks of a student that predicts its teacher's class tokens and masked patches."""

    name: str
    num_prototypes: int = Field(65536, gt=1)
    """Width of the output that student and teacher agree on for class tokens; with a shared head for patches too."""
    head_hidden_dim: Width = 2048
    """Width of the class head's hidden layers."""
    head_bottleneck_dim: Width = 256
    """Width of the class head's normalised bottleneck."""
    head_layers: Depth = 3
    """Linear layers of the class head before the prototypes."""
    num_patch_prototypes: int | None = Field(None, gt=1)
    """Prototypes of a patch head of its own; null: as many as for class tokens."""
    patch_head_hidden: Width | None = None
    """Width of its hidden layers; null: as the class head's."""
    patch_head_bottleneck: Width | None = None
    """Width of its bottleneck; null: as the class head's."""
    freeze_prototypes_for: Duration = Duration("1ep")
    """How long the student's last layers stay as they were initialised."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """Iterations of Sinkhorn-Knopp."""
    class_weight: float = Field(1.0, ge=0)
    """Weight of the class tokens' loss (`dino.loss_weight`)."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the patches' loss (`ibot.loss_weight`)."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of KoLeo, the sum over both large crops (`dino.koleo_loss_weight`)."""
    koleo_per_process: bool = False
    """Whether KoLeo looks for neighbours only among the images of each process, as the official code does."""
    mask_probability: float = Field(0.5, ge=0, le=1)
    """Share of the step's large crops that have a mask."""
    mask_ratio: Annotated[tuple[float, float], InRange(ge=0, lt=1, increasing=True)] = (0.1, 0.5)
    """Smallest and largest share of masked patches of a crop that has a mask, spread evenly over the step's crops."""
    mask_min_block: int = Field(4, ge=1)
    """Smallest area of a block in patches."""
    mask_max_block: int | None = Field(None, ge=1)
    """Largest area of a block in patches; null: half of the backbone's grid."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each block to the one before it."""
    patch_embed_lr_scale: float = Field(0.2, gt=0)
    """Further factor on the learning rate of the patch embedding."""

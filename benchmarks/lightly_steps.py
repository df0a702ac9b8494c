"""Training steps in the shape of lightly's PyTorch examples (https://github.com/lightly-ai/lightly), with its modules.

Its examples put each view through the network on its own. The networks are copies of ours where lightly leaves the
choice to its user, so all run the same blocks and the same attention.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.training_steps import TrainingStep, copy_of_model, copy_of_vit, copy_weights, decayed_groups, everything
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.dino import DINO
from ssl_pipeline.methods.mae import MAE
from ssl_pipeline.methods.moco import MoCo
from ssl_pipeline.methods.simclr import SimCLR


def lightly_dino(method: DINO) -> TrainingStep:
    """DINOProjectionHead, DINOLoss and update_momentum around a timm ViT; every crop in a pass of its own."""
    from lightly.models.utils import update_momentum

    student_backbone, teacher_backbone = (copy_of_vit(method.student.backbone) for _ in range(2))
    student_head, teacher_head = dino_head(method), dino_head(method)
    for part in (teacher_backbone, teacher_head):
        part.requires_grad_(False)
    criterion = dino_loss(method)

    def loss(batch: Batch) -> Tensor:
        crops = [crop for views in batch.views.values() for crop in views.unbind()]
        with torch.no_grad():
            targets = [teacher_head(teacher_backbone(crop)) for crop in crops[:2]]
        return criterion(targets, [student_head(student_backbone(crop)) for crop in crops])

    def follow() -> None:
        update_momentum(student_backbone, teacher_backbone, m=0.996)
        update_momentum(student_head, teacher_head, m=0.996)

    optimizer = torch.optim.AdamW(decayed_groups([student_backbone, student_head], 0.04), lr=5e-4)
    return TrainingStep(loss, optimizer, follow=follow)


def dino_head(method: DINO) -> nn.Module:
    """lightly's head with the weights of ours."""
    from lightly.models.modules import DINOProjectionHead

    config, own = method.config, method.student.head
    width = method.student.backbone.embed_dim
    assert isinstance(width, int)
    head = DINOProjectionHead(width, config.head_hidden_dim, config.head_bottleneck_dim, config.num_prototypes)
    head.to(method.centre.device)
    copy_weights(own, head)
    return head


def dino_loss(method: DINO) -> nn.Module:
    """lightly's loss, with the teacher's temperature at its end."""
    from lightly.loss import DINOLoss

    return DINOLoss(output_dim=method.config.num_prototypes, teacher_temp=0.04).to(method.centre.device)


class LightlyMae(nn.Module):
    """MaskedVisionTransformerTIMM and its decoder; the class token is one of the tokens that are kept."""

    def __init__(self, method: MAE) -> None:
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        vit, decoder, config = copy_of_vit(method.backbone), method.decoder, method.config
        device = decoder.mask_token.device
        self.mask_ratio, self.patch_size = config.mask_ratio, method.backbone.patch_size
        self.encoder = MaskedVisionTransformerTIMM(
            vit=vit, weight_initialization="skip", pos_embed_initialization="skip"
        ).to(device)
        self.embed, self.predict = deepcopy(decoder.embed), deepcopy(decoder.predict)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        ).to(device)
        self.decoder.blocks = deepcopy(decoder.blocks)

    def forward(self, images: Tensor) -> Tensor:
        from lightly.models import utils

        length = self.encoder.sequence_length
        kept, removed = utils.random_token_mask((len(images), length), self.mask_ratio, device=images.device)
        visible = self.embed(self.encoder.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length)).to(visible.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, kept, visible))
        prediction = self.predict(utils.get_at_index(decoded, removed))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), removed - 1)
        return nn.functional.mse_loss(prediction, target)


def lightly_mae(method: MAE) -> TrainingStep:
    """The example's step; its targets are plain pixels."""
    network = LightlyMae(method)
    optimizer = torch.optim.AdamW(decayed_groups([network], 0.05), lr=1.5e-4, betas=(0.9, 0.95))
    return TrainingStep(lambda batch: network(batch.views["image"][0]), optimizer)


def lightly_simclr(method: SimCLR) -> TrainingStep:
    """SimCLRProjectionHead and NTXentLoss; each view in a pass of its own."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    backbone = copy_of_model(method.backbone)
    config = method.config
    head = SimCLRProjectionHead(
        method.backbone.embed_dim,
        config.projector_hidden_dim,
        config.projector_dim,
        num_layers=config.projector_layers,
    ).to(next(backbone.parameters()).device)
    copy_weights(method.encoder.head, head)
    criterion = NTXentLoss(temperature=config.temperature)

    def loss(batch: Batch) -> Tensor:
        first, second = (head(backbone(view)) for view in batch.views["view"].unbind())
        return criterion(first, second)

    return TrainingStep(loss, torch.optim.SGD(everything([backbone, head]), lr=0.03, momentum=0.9, weight_decay=5e-4))


def lightly_moco(method: MoCo) -> TrainingStep:
    """MoCoProjectionHead, update_momentum and NTXentLoss with its memory bank."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import update_momentum

    config, device = method.config, method.queue.features.device
    backbone = copy_of_model(method.backbone)
    head = MoCoProjectionHead(
        method.backbone.embed_dim,
        config.projector_hidden_dim,
        config.projector_dim,
        num_layers=config.projector_layers,
    ).to(device)
    copy_weights(method.student.head, head)
    teacher_backbone, teacher_head = (deepcopy(part).requires_grad_(False) for part in (backbone, head))
    criterion = NTXentLoss(
        temperature=config.temperature, memory_bank_size=(config.queue_size, config.projector_dim)
    ).to(device)
    criterion.memory_bank.bank.copy_(method.queue.features)

    def loss(batch: Batch) -> Tensor:
        first, second = batch.views["view"].unbind()
        update_momentum(backbone, teacher_backbone, m=0.999)
        update_momentum(head, teacher_head, m=0.999)
        queries = head(backbone(first))
        with torch.no_grad():
            keys = teacher_head(teacher_backbone(second))
        return criterion(queries, keys)

    return TrainingStep(loss, torch.optim.SGD(everything([backbone, head]), lr=0.03, momentum=0.9, weight_decay=5e-4))

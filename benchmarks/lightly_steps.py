"""Training steps in the shape of lightly's PyTorch examples (https://github.com/lightly-ai/lightly), with its modules.

Its examples put each view through the network on its own. The networks are copies of ours where lightly leaves the
choice to its user, so all run the same blocks and the same attention.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.training_steps import TrainingStep, adamw, copy_of_model, copy_of_vit, sgd
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods import DINO, MAE, MoCo, SimCLR
from ssl_pipeline.modules.encoder import Encoder


def lightly_dino(method: DINO) -> TrainingStep:
    """DINOProjectionHead, DINOLoss and update_momentum around a timm ViT; every crop in a pass of its own."""
    from lightly.models.utils import update_momentum

    student, teacher = (nn.Sequential(copy_of_model(method.student.backbone), dino_head(method)) for _ in range(2))
    teacher.requires_grad_(False)
    criterion = dino_loss(method)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            targets = [teacher(crop) for crop in batch.views["global"]]
        return criterion(targets, [student(crop) for views in batch.views.values() for crop in views])

    def follow() -> None:
        for part, followed in zip(teacher, student, strict=True):
            update_momentum(followed, part, m=0.996)

    return TrainingStep(loss, adamw(student, lr=5e-4, weight_decay=0.04), follow=follow)


def dino_head(method: DINO) -> nn.Module:
    """lightly's head with the weights of ours."""
    config, student = method.config, method.student
    widths = (config.head_hidden_dim, config.head_bottleneck_dim, config.num_prototypes)
    return _head("DINOProjectionHead", student.head, student.backbone.embed_dim, *widths)


def dino_loss(method: DINO) -> nn.Module:
    """lightly's loss, with the teacher's temperature at its end."""
    from lightly.loss import DINOLoss

    return DINOLoss(output_dim=method.config.num_prototypes, teacher_temp=0.04).to(next(method.parameters()).device)


def _head(kind: str, own: nn.Module, *widths: int, **options: int) -> nn.Module:
    """One of lightly's heads with our weights, parameter by parameter in their order."""
    from lightly.models import modules

    head = getattr(modules, kind)(*widths, **options).to(next(own.parameters()).device)
    with torch.no_grad():
        for parameter, ours in zip(head.parameters(), own.parameters(), strict=True):
            parameter.copy_(ours.view_as(parameter))
    return head


class LightlyMae(nn.Module):
    """MaskedVisionTransformerTIMM and its decoder; the class token is one of the tokens that are kept."""

    def __init__(self, method: MAE) -> None:
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        vit, decoder, config = copy_of_vit(method.encoder)[0], method.decoder, method.config
        self.mask_ratio, self.patch_size = config.mask_ratio, method.encoder.patch_size
        kept = {"weight_initialization": "skip", "pos_embed_initialization": "skip"}
        self.encoder = MaskedVisionTransformerTIMM(vit=vit, **kept)
        self.embed, self.predict = deepcopy(decoder.embed), deepcopy(decoder.predict)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )
        self.decoder.blocks = deepcopy(decoder.blocks)
        self.to(decoder.mask_token.device)

    def forward(self, images: Tensor) -> Tensor:
        from lightly.models import utils

        shape = (len(images), self.encoder.sequence_length)
        kept, removed = utils.random_token_mask(shape, self.mask_ratio, device=images.device)
        visible = self.embed(self.encoder.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).to(visible.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, kept, visible))
        prediction = self.predict(utils.get_at_index(decoded, removed))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), removed - 1)
        return nn.functional.mse_loss(prediction, target)


def lightly_mae(method: MAE) -> TrainingStep:
    """The example's step; its targets are plain pixels."""
    network = LightlyMae(method)
    optimizer = adamw(network, lr=1.5e-4, weight_decay=0.05, second_beta=0.95)
    return TrainingStep(lambda batch: network(batch.one("image")), optimizer)


def lightly_simclr(method: SimCLR) -> TrainingStep:
    """SimCLRProjectionHead and NTXentLoss; each view in a pass of its own."""
    from lightly.loss import NTXentLoss

    network = _contrastive_network("SimCLRProjectionHead", method.encoder, method.config.projector_layers)
    criterion = NTXentLoss(temperature=method.config.temperature)
    return TrainingStep(lambda batch: criterion(*map(network, batch.two("view"))), sgd(network))


def lightly_moco(method: MoCo) -> TrainingStep:
    """MoCoProjectionHead, update_momentum and NTXentLoss with its memory bank."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import update_momentum

    config, queue = method.config, method.queue.features
    student = _contrastive_network("MoCoProjectionHead", method.student, config.projector_layers)
    teacher = deepcopy(student).requires_grad_(False)
    bank = (config.queue_size, config.projector_dim)
    criterion = NTXentLoss(temperature=config.temperature, memory_bank_size=bank).to(queue.device)
    criterion.memory_bank.bank.copy_(queue)

    def loss(batch: Batch) -> Tensor:
        first, second = batch.two("view")
        for part, followed in zip(teacher, student, strict=True):
            update_momentum(followed, part, m=0.999)
        queries = student(first)
        with torch.no_grad():
            keys = teacher(second)
        return criterion(queries, keys)

    return TrainingStep(loss, sgd(student))


def _contrastive_network(head: str, encoder: Encoder, num_layers: int) -> nn.Sequential:
    """A copy of our backbone under lightly's head of the same widths."""
    linear = [layer for layer in encoder.head if isinstance(layer, nn.Linear)]
    widths = (linear[0].in_features, linear[0].out_features, linear[-1].out_features)
    return nn.Sequential(copy_of_model(encoder.backbone), _head(head, encoder.head, *widths, num_layers=num_layers))

"""Training steps in the shape of the official repositories, written anew.

DINO (https://github.com/facebookresearch/dino, main_dino.py, utils.py), MAE (https://github.com/facebookresearch/mae,
models_mae.py), MoCo (https://github.com/facebookresearch/moco, moco/builder.py), and SimCLR as its PyTorch ports have
it. The networks are copies of ours, so all run the same blocks and the same attention; what differs is how a step uses
them. Mixed precision is bfloat16 here, where their code has float16 with a gradient scaler.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from benchmarks.training_steps import (
    TrainingStep,
    class_token,
    copy_of_model,
    copy_of_vit,
    copy_weights,
    decayed_groups,
    everything,
    follow_in_a_loop,
    position_table,
)
from ssl_pipeline.backbones.positions import sincos_position_embedding
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.dino import DINO
from ssl_pipeline.methods.mae import MAE
from ssl_pipeline.methods.moco import MoCo
from ssl_pipeline.methods.simclr import SimCLR
from ssl_pipeline.modules.heads import PrototypeHead

TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.04, 0.1


class DinoVit(nn.Module):
    """A ViT whose position table is interpolated in every forward pass that needs another size."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        tokens = model.patch_embed(images)
        rows, columns = tokens.shape[1:3]
        first = class_token(model).expand(len(images), -1, -1)
        tokens = torch.cat([first, tokens.flatten(1, 2)], dim=1) + self.positions(rows, columns)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        table, side = position_table(self.model), self.model.patch_embed.grid_size[0]
        if rows == columns == side:
            return table
        patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class DinoHead(nn.Module):
    """Three layers, a unit-length bottleneck and weight-normalised prototypes."""

    def __init__(self, mlp: nn.Sequential, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck_dim, num_prototypes, bias=False))
        self.last_layer.weight_g.data.fill_(1)  # type: ignore[operator]
        self.last_layer.weight_g.requires_grad = False

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))


class MultiCrop(nn.Module):
    """The backbone once per run of crops of one size, the head once for all."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        features, start = [], 0
        for end in range(1, len(crops) + 1):
            if end == len(crops) or crops[end].shape[-1] != crops[start].shape[-1]:
                features.append(self.backbone(torch.cat(list(crops[start:end]))))
                start = end
        return self.head(torch.cat(features))


class DinoLoss(nn.Module):
    """Whole logits; a softmax for each pair of crops; the centre is updated with the loss."""

    centre: Tensor

    def __init__(self, num_prototypes: int, num_crops: int) -> None:
        super().__init__()
        self.num_crops = num_crops
        self.register_buffer("centre", torch.zeros(1, num_prototypes))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student_crops = (student / STUDENT_TEMPERATURE).chunk(self.num_crops)
        targets = F.softmax((teacher - self.centre) / TEACHER_TEMPERATURE, dim=-1).detach().chunk(2)
        total, pairs = student.new_zeros(()), 0
        for number, target in enumerate(targets):
            for other, crop in enumerate(student_crops):
                if other != number:
                    total = total + torch.sum(-target * F.log_softmax(crop, dim=-1), dim=-1).mean()
                    pairs += 1
        self.centre = self.centre * 0.9 + teacher.detach().mean(dim=0, keepdim=True) * 0.1
        return total / pairs


def dino_head(method: DINO) -> DinoHead:
    """The official head with the weights of ours."""
    own = method.student.head
    assert isinstance(own, PrototypeHead)
    num_prototypes, bottleneck_dim = own.last_layer.weight_v.shape
    head = DinoHead(deepcopy(own.mlp), bottleneck_dim, num_prototypes).to(method.centre.device)
    copy_weights(own, head)
    return head


def official_dino(method: DINO, *, num_crops: int) -> TrainingStep:
    """main_dino.py's step."""
    backbone = method.student.backbone
    student, teacher = (MultiCrop(DinoVit(copy_of_vit(backbone)), dino_head(method)) for _ in range(2))
    teacher.requires_grad_(False)
    criterion = DinoLoss(method.config.num_prototypes, num_crops).to(method.centre.device)

    def loss(batch: Batch) -> Tensor:
        crops = [crop for views in batch.views.values() for crop in views.unbind()]
        with torch.no_grad():
            targets = teacher(crops[:2])
        return criterion(student(crops), targets)

    def clip() -> None:
        for parameter in student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.data.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.data.mul_(factor)

    optimizer = torch.optim.AdamW(decayed_groups([student], 0.04), lr=5e-4)
    return TrainingStep(loss, optimizer, clip, lambda: follow_in_a_loop([student], [teacher], 0.996))


class MaskedAutoencoder(nn.Module):
    """models_mae.py: all patches are embedded, a quarter is encoded, all are predicted.

    encode_all: the removed patches become mask tokens before the encoder instead, which then sees all of them.
    """

    def __init__(self, method: MAE, *, encode_all: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = copy_of_vit(method.encoder), deepcopy(method.decoder)
        self.mask_ratio, self.patch_size = method.config.mask_ratio, method.encoder.patch_size
        positions = sincos_position_embedding(self.decoder.mask_token.shape[-1], method.encoder.grid, class_token=True)
        self.decoder_positions: Tensor
        self.register_buffer("decoder_positions", positions[None].to(self.decoder.mask_token))
        self.encode_all = encode_all
        self.encoder_mask = nn.Parameter(torch.zeros_like(class_token(self.encoder))) if encode_all else None

    def forward(self, images: Tensor) -> Tensor:
        model, positions = self.encoder, position_table(self.encoder)
        tokens = model.patch_embed(images).flatten(1, 2) + positions[:, 1:]
        noise = torch.rand(tokens.shape[:2], device=tokens.device)
        shuffled = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffled, dim=1)
        num_kept = int(tokens.shape[1] * (1 - self.mask_ratio))
        mask = (restore >= num_kept).float()
        if self.encoder_mask is not None:
            tokens = torch.where(mask[..., None] > 0, self.encoder_mask + positions[:, 1:], tokens)
        else:
            tokens = tokens.gather(1, shuffled[:, :num_kept, None].expand(-1, -1, tokens.shape[2]))
        first = (class_token(model) + positions[:, :1]).expand(len(tokens), -1, -1)
        encoded = model.norm(model.blocks(torch.cat([first, tokens], dim=1)))
        return self.error(images, self.decode(encoded, restore), mask)

    def decode(self, encoded: Tensor, restore: Tensor) -> Tensor:
        decoder = self.decoder
        tokens = decoder.embed(encoded)
        if not self.encode_all:
            missing = restore.shape[1] + 1 - tokens.shape[1]
            masks = decoder.mask_token.repeat(len(tokens), missing, 1).to(tokens.dtype)
            patches = torch.cat([tokens[:, 1:], masks], dim=1)
            patches = patches.gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        tokens = decoder.norm(decoder.blocks(tokens + self.decoder_positions))
        return decoder.predict(tokens)[:, 1:]

    def error(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        side = self.patch_size
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        target = patches.flatten(3).flatten(1, 2)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


def official_mae(method: MAE, *, encode_all: bool = False) -> TrainingStep:
    """main_pretrain.py's step."""
    network = MaskedAutoencoder(method, encode_all=encode_all)
    optimizer = torch.optim.AdamW(decayed_groups([network], 0.05), lr=1.5e-4, betas=(0.9, 0.95))
    return TrainingStep(lambda batch: network(batch.views["image"][0]), optimizer)


def plain_simclr(method: SimCLR) -> TrainingStep:
    """Both views in one pass and the whole matrix of similarities, in torch's default memory layout."""
    backbone = copy_of_model(method.backbone)
    projector = deepcopy(method.encoder.head)
    temperature = method.config.temperature

    def loss(batch: Batch) -> Tensor:
        embeddings = F.normalize(projector(backbone(torch.cat(batch.views["view"].unbind()))), dim=1)
        similarity = embeddings @ embeddings.T
        num_rows = len(embeddings)
        own = torch.eye(num_rows, dtype=torch.bool, device=similarity.device)
        positive = own.roll(num_rows // 2, dims=1)
        positives = similarity[positive].view(num_rows, 1)
        negatives = similarity[~(own | positive)].view(num_rows, -1)
        logits = torch.cat([positives, negatives], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(num_rows, dtype=torch.long, device=logits.device))

    return TrainingStep(loss, _sgd([backbone, projector]))


def official_moco(method: MoCo) -> TrainingStep:
    """moco/builder.py's step on one process, keys shuffled for batch norm as there."""
    student = nn.Sequential(copy_of_model(method.backbone), deepcopy(method.student.head))
    teacher = deepcopy(student).requires_grad_(False)
    queue = method.queue.features.T.clone()
    temperature, position = method.config.temperature, 0

    def loss(batch: Batch) -> Tensor:
        nonlocal position
        first, second = batch.views["view"].unbind()
        queries = F.normalize(student(first), dim=1)
        with torch.no_grad():
            follow_in_a_loop([student], [teacher], 0.999)
            order = torch.randperm(len(second), device=second.device)
            keys = F.normalize(teacher(second[order]), dim=1)[torch.argsort(order)]
        positives = torch.einsum("nc,nc->n", queries, keys)[:, None]
        negatives = torch.einsum("nc,ck->nk", queries, queue.clone().detach())
        logits = torch.cat([positives, negatives], dim=1) / temperature
        queue[:, position : position + len(keys)] = keys.T
        position = (position + len(keys)) % queue.shape[1]
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    return TrainingStep(loss, _sgd([student]))


def _sgd(modules: Sequence[nn.Module]) -> torch.optim.Optimizer:
    return torch.optim.SGD(everything(modules), lr=0.03, momentum=0.9, weight_decay=5e-4)

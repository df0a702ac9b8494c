"""Training steps in the shape of the official repositories, written anew.

DINO (https://github.com/facebookresearch/dino, main_dino.py, utils.py), MAE (https://github.com/facebookresearch/mae,
models_mae.py), MoCo (https://github.com/facebookresearch/moco, moco/builder.py), and SimCLR as its PyTorch ports have
it. The networks are copies of ours, so all run the same blocks and the same attention; what differs is how a step uses
them. Mixed precision is bfloat16 here, where their code has float16 with a gradient scaler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_steps import TrainingStep, adamw, copy_of_model, copy_of_vit, follow_in_a_loop, sgd
from ssl_pipeline.backbones import Backbone
from ssl_pipeline.backbones.patches import patchify
from ssl_pipeline.backbones.positions import sincos_position_embedding
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods import DINO, MAE, MoCo, SimCLR

STUDENT_TEMPERATURE = 0.1


class MultiCropViT(nn.Module):
    """A ViT, whose position table is interpolated in every forward pass that needs another size, and its head."""

    def __init__(self, backbone: Backbone, head: nn.Module, mask_token: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.first, self.table = copy_of_vit(backbone)
        self.head = deepcopy(head)
        self.mask_token = None if mask_token is None else nn.Parameter(mask_token.detach().clone())

    def tokens(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """(N, 1 + L, D), the class token first; the mask token takes the place of `masked` patches (N, L)."""
        tokens = self.model.patch_embed(images)
        rows, columns = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        if masked is not None and self.mask_token is not None:
            tokens = torch.where(masked[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1) + self.positions(rows, columns)
        return self.model.norm(self.model.blocks(tokens))

    def positions(self, rows: int, columns: int) -> Tensor:
        side = self.model.patch_embed.grid_size[0]
        if rows == columns == side:
            return self.table
        patches = self.table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([self.table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class TeacherTargets:
    """A teacher's probabilities, by logits of which a moving average of their mean is subtracted."""

    def __init__(self, temperature: float) -> None:
        self.temperature, self.centre = temperature, torch.zeros(())

    def of(self, logits: Tensor) -> Tensor:
        return F.softmax((logits - self.centre) / self.temperature, dim=-1)

    def update(self, logits: Tensor) -> None:
        self.centre = self.centre * 0.9 + logits.mean(dim=tuple(range(logits.ndim - 1)), keepdim=True) * 0.1


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1)


def pairs(targets: Sequence[Tensor], crops: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target with each crop but its own, which has its number."""
    for number, target in enumerate(targets):
        yield from ((target, crop) for crop in (*crops[:number], *crops[number + 1 :]))


def mean_of(losses: Iterable[Tensor]) -> Tensor:
    """Summed up one by one, the mean of each."""
    means = [loss.mean() for loss in losses]
    return reduce(torch.add, means) / len(means)


def dino_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """Whole logits; a softmax for each pair of crops; the centre is updated with the loss."""
    targets = TeacherTargets(temperature=0.04)

    def loss(teacher: Tensor, student: Tensor) -> Tensor:
        crops = (student / STUDENT_TEMPERATURE).split(len(teacher) // 2)
        total = mean_of(cross_entropy(*pair) for pair in pairs(targets.of(teacher).detach().chunk(2), crops))
        targets.update(teacher.detach())
        return total

    return loss


def official_dino(method: DINO) -> TrainingStep:
    """main_dino.py's step: the backbone once per size of crops, the head once for all."""
    student = MultiCropViT(method.student.backbone, method.student.head)
    teacher = deepcopy(student).requires_grad_(False)
    criterion = dino_loss()

    def logits(network: MultiCropViT, groups: Iterable[Tensor]) -> Tensor:
        return network.head(torch.cat([network.tokens(views.flatten(0, 1))[:, 0] for views in groups]))

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            targets = logits(teacher, [batch.views["global"]])
        return criterion(targets, logits(student, batch.views.values()))

    def clip() -> None:
        for parameter in student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.data.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.data.mul_(factor)

    optimizer = adamw(student, lr=5e-4, weight_decay=0.04)
    return TrainingStep(loss, optimizer, clip, lambda: follow_in_a_loop(student, teacher, 0.996))


class MaskedAutoencoder(nn.Module):
    """models_mae.py: all patches are embedded, a quarter is encoded, all are predicted.

    encode_all: the removed patches become mask tokens before the encoder instead, which then sees all of them.
    """

    decoder_positions: Tensor

    def __init__(self, method: MAE, *, encode_all: bool) -> None:
        super().__init__()
        self.model, self.first, self.table = copy_of_vit(method.encoder)
        self.decoder, self.encode_all = deepcopy(method.decoder), encode_all
        self.mask_ratio, self.patch_size = method.config.mask_ratio, method.encoder.patch_size
        dim = self.decoder.mask_token.shape[-1]
        positions = sincos_position_embedding(dim, method.encoder.grid, class_token=True)
        self.register_buffer("decoder_positions", positions[None].to(self.decoder.mask_token))
        self.encoder_mask = nn.Parameter(torch.zeros_like(self.first), requires_grad=encode_all)

    def forward(self, images: Tensor, removed: Tensor) -> Tensor:
        tokens = self.model.patch_embed(images).flatten(1, 2) + self.table[:, 1:]
        noise = torch.rand(removed.shape, device=removed.device) + removed  # their draw, but the patches that we remove
        shuffled = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffled, dim=1)
        num_kept = int(tokens.shape[1] * (1 - self.mask_ratio))
        mask = (restore >= num_kept).float()
        if self.encode_all:
            tokens = torch.where(mask[..., None] > 0, self.encoder_mask + self.table[:, 1:], tokens)
        else:
            tokens = tokens.gather(1, shuffled[:, :num_kept, None].expand(-1, -1, tokens.shape[2]))
        first = (self.first + self.table[:, :1]).expand(len(tokens), -1, -1)
        encoded = self.model.norm(self.model.blocks(torch.cat([first, tokens], dim=1)))
        target = patchify(images, self.patch_size)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (self.decode(encoded, restore) - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def decode(self, encoded: Tensor, restore: Tensor) -> Tensor:
        tokens = self.decoder.embed(encoded)
        if not self.encode_all:
            missing = restore.shape[1] + 1 - tokens.shape[1]
            masks = self.decoder.mask_token.repeat(len(tokens), missing, 1).to(tokens.dtype)
            patches = torch.cat([tokens[:, 1:], masks], dim=1)
            patches = patches.gather(1, restore[..., None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        tokens = self.decoder.norm(self.decoder.blocks(tokens + self.decoder_positions))
        return self.decoder.predict(tokens)[:, 1:]


def official_mae(method: MAE, *, encode_all: bool = False) -> TrainingStep:
    """main_pretrain.py's step."""
    network = MaskedAutoencoder(method, encode_all=encode_all)
    optimizer = adamw(network, lr=1.5e-4, weight_decay=0.05, second_beta=0.95)
    return TrainingStep(lambda batch: network(batch.one("image"), batch.masks["image"][0]), optimizer)


def plain_simclr(method: SimCLR) -> TrainingStep:
    """Both views in one pass and the whole matrix of similarities, in torch's default memory layout."""
    network = nn.Sequential(copy_of_model(method.backbone), deepcopy(method.encoder.head))
    loss = partial(whole_nt_xent, temperature=method.config.temperature)
    return TrainingStep(lambda batch: loss(*network(torch.cat(batch.two("view"))).chunk(2)), sgd(network))


def whole_nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent over one matrix of similarities."""
    rows = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = rows @ rows.T / temperature
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    partner = torch.arange(len(rows), device=rows.device).roll(len(z1))
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), partner)


def official_moco(method: MoCo) -> TrainingStep:
    """moco/builder.py's step on one process, keys shuffled for batch norm as there."""
    student = nn.Sequential(copy_of_model(method.backbone), deepcopy(method.student.head))
    teacher = deepcopy(student).requires_grad_(False)
    queue, position = method.queue.features.T.clone(), 0

    def loss(batch: Batch) -> Tensor:
        nonlocal position
        first, second = batch.two("view")
        queries = F.normalize(student(first), dim=1)
        with torch.no_grad():
            follow_in_a_loop(student, teacher, 0.999)
            order = torch.randperm(len(second), device=second.device)
            keys = F.normalize(teacher(second[order]), dim=1)[torch.argsort(order)]
        positives = torch.einsum("nc,nc->n", queries, keys)[:, None]
        negatives = torch.einsum("nc,ck->nk", queries, queue.clone().detach())
        queue[:, position : position + len(keys)] = keys.T
        position = (position + len(keys)) % queue.shape[1]
        logits = torch.cat([positives, negatives], dim=1) / method.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    return TrainingStep(loss, sgd(student))

"""Training steps in the shape of the official repositories of SwAV, iBOT and DINOv2, written anew.

SwAV (https://github.com/facebookresearch/swav, main_swav.py), iBOT (https://github.com/bytedance/ibot, main_ibot.py)
and DINOv2 (https://github.com/facebookresearch/dinov2, train/ssl_meta_arch.py), all with whole logits. DINOv2's
attention over crops of several sizes at once needs xFormers; here each size goes through the blocks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.official_steps import STUDENT_TEMPERATURE, MultiCropViT
from benchmarks.training_steps import TrainingStep, adamw, copy_of_model, follow_at_once, follow_in_a_loop, sgd
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.dinov2 import DINOv2
from ssl_pipeline.methods.ibot import IBOT
from ssl_pipeline.methods.swav import SwAV
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.token_heads import TokenHeads

TEACHER_TEMPERATURE = 0.07  # what both methods' defaults reach after their warm-up


def official_swav(method: SwAV) -> TrainingStep:
    """main_swav.py's step, without a queue."""
    network = nn.Sequential(copy_of_model(method.encoder.backbone), deepcopy(method.encoder.head))
    prototypes = deepcopy(method.prototypes)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))
        crops = [views.flatten(0, 1) for views in batch.views.values()]
        embeddings = F.normalize(network[1](torch.cat([network[0](views) for views in crops])), dim=1)
        scores = prototypes(embeddings).split(batch.views["global"].shape[1])
        total = embeddings.new_zeros(())
        for assigned in (0, 1):
            codes = assignment(scores[assigned].detach(), method.config.epsilon, method.config.sinkhorn_iterations)
            others = [crop for number, crop in enumerate(scores) if number != assigned]
            losses = [_cross_entropy(codes, crop, method.config.temperature).mean() for crop in others]
            total = total + sum(losses) / len(others)
        return total / 2

    return TrainingStep(loss, sgd(nn.ModuleList([network, prototypes])))


@torch.no_grad()
def assignment(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp over one matrix."""
    codes = torch.exp(scores / epsilon).T
    codes /= codes.sum()
    for _ in range(iterations):
        codes /= codes.sum(dim=1, keepdim=True) * codes.shape[0]
        codes /= codes.sum(dim=0, keepdim=True) * codes.shape[1]
    return (codes * codes.shape[1]).T


class MaskedMultiCrop(MultiCropViT):
    """A ViT in which mask tokens take the place of masked patches, and a head."""

    def __init__(self, encoder: Encoder[TokenHeads], mask_token: Tensor) -> None:
        super().__init__(encoder.backbone)
        self.head, self.mask_token = deepcopy(encoder.head.classes), nn.Parameter(mask_token.detach().clone())

    def whole(self, images: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the class token and of every patch, as iBOT's head gives them."""
        return self.logits(self.tokens(images, masked, self.mask_token))

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(tokens)
        return logits[:, 0], logits[:, 1:]


def official_ibot(method: IBOT) -> TrainingStep:
    """main_ibot.py's step: heads see all tokens of all crops, the patches' loss is computed whole and then masked."""
    student, teacher = (MaskedMultiCrop(method.student, method.mask_token) for _ in range(2))
    teacher.requires_grad_(False)
    centres = [torch.zeros(()), torch.zeros(())]

    def loss(batch: Batch) -> Tensor:
        large, masks = batch.views["global"].flatten(0, 1), batch.masks["global"]
        with torch.no_grad():
            classes, patches = teacher.whole(large)
            targets = [
                _targets(logits, centre).chunk(2) for logits, centre in zip((classes, patches), centres, strict=True)
            ]
        own, own_patches = student.whole(large, masks.flatten(0, 1))
        small = student.whole(batch.views["local"].flatten(0, 1))[0]
        crops = (*own.chunk(2), *small.split(len(own) // 2))
        class_losses, patch_losses = [], []
        for number, (target, patch_target, mask) in enumerate(zip(*targets, masks.float(), strict=True)):
            each = _cross_entropy(patch_target, own_patches.chunk(2)[number], STUDENT_TEMPERATURE)
            patch_losses.append(((each * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean())
            others = [crop for position, crop in enumerate(crops) if position != number]
            class_losses += [_cross_entropy(target, crop, STUDENT_TEMPERATURE).mean() for crop in others]
        centres[0] = centres[0] * 0.9 + classes.mean(dim=0, keepdim=True) * 0.1
        centres[1] = centres[1] * 0.9 + patches.mean(dim=(0, 1), keepdim=True) * 0.1
        return _mean(class_losses) + _mean(patch_losses)

    optimizer = adamw(student, lr=5e-4, weight_decay=0.04)
    return TrainingStep(loss, optimizer, _clip(student), lambda: follow_in_a_loop(student, teacher, 0.996))


def official_dinov2(method: DINOv2) -> TrainingStep:
    """ssl_meta_arch.py's step: one call of the head for class tokens and masked patches, one head for both, KoLeo."""
    student, teacher = (MaskedMultiCrop(method.student, method.mask_token) for _ in range(2))
    teacher.requires_grad_(False)
    centres = [torch.zeros(()), torch.zeros(())]

    def loss(batch: Batch) -> Tensor:
        large, mask = batch.views["global"].flatten(0, 1), batch.masks["global"].flatten(0, 1)
        places = mask.flatten().nonzero().flatten()
        with torch.no_grad():
            seen = teacher.tokens(large)
            rows = torch.cat([seen[:, 0], seen[:, 1:].flatten(0, 1).index_select(0, places)])
            classes, patches = teacher.head(rows).split([len(seen), len(places)])
            targets, patch_targets = _targets(classes, centres[0]).chunk(2), _targets(patches, centres[1])
        own = student.tokens(large, mask, student.mask_token)
        small = student.tokens(batch.views["local"].flatten(0, 1))[:, 0]
        own_patches = own[:, 1:].flatten(0, 1).index_select(0, places)
        parts = [len(small), len(own), len(places)]
        of_small, of_large, of_patches = student.head(torch.cat([small, own[:, 0], own_patches])).split(parts)
        losses = [_cross_entropy(target, crop, STUDENT_TEMPERATURE).mean()
                  for crop in of_small.split(len(own) // 2) for target in targets]  # fmt: skip
        swapped = _cross_entropy(torch.cat(targets[::-1]), of_large, STUDENT_TEMPERATURE).mean()
        class_loss = (sum(losses) + 2 * swapped) / (len(losses) + 2)
        weights = (1 / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(mask)[mask]
        patch_loss = (_cross_entropy(patch_targets, of_patches, STUDENT_TEMPERATURE) * weights).sum() / len(mask)
        centres[0] = centres[0] * 0.9 + classes.mean(dim=0, keepdim=True) * 0.1
        centres[1] = centres[1] * 0.9 + patches.mean(dim=0, keepdim=True) * 0.1
        return class_loss + patch_loss + 0.1 * sum(_koleo(crop) for crop in own[:, 0].chunk(2))

    optimizer = adamw(student, lr=5e-4, weight_decay=0.04)
    return TrainingStep(loss, optimizer, _clip(student), lambda: follow_at_once(student, teacher, 0.992))


def _koleo(tokens: Tensor) -> Tensor:
    rows = F.normalize(tokens, dim=-1)
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(rows, rows[nearest], eps=1e-8) + 1e-8).mean()


def _targets(logits: Tensor, centre: Tensor) -> Tensor:
    return F.softmax((logits - centre) / TEACHER_TEMPERATURE, dim=-1)


def _cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return torch.sum(-targets * F.log_softmax(logits / temperature, dim=-1), dim=-1)


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _clip(network: nn.Module) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_norm_(network.parameters(), 3.0)

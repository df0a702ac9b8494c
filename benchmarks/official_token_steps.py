"""Training steps in the shape of the official repositories of SwAV, iBOT and DINOv2, written anew.

SwAV (https://github.com/facebookresearch/swav, main_swav.py), iBOT (https://github.com/bytedance/ibot, main_ibot.py)
and DINOv2 (https://github.com/facebookresearch/dinov2, train/ssl_meta_arch.py), all with whole logits. DINOv2's
attention over crops of several sizes at once needs xFormers; here each size goes through the blocks by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.official_steps import STUDENT_TEMPERATURE, MultiCropViT, TeacherTargets, cross_entropy, mean_of, pairs
from benchmarks.training_steps import TrainingStep, adamw, copy_of_model, follow_in_a_loop, sgd
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods import IBOT, DINOv2, SwAV

TEACHER_TEMPERATURE = 0.07  # what both methods' defaults reach after their warm-up


def official_swav(method: SwAV) -> TrainingStep:
    """main_swav.py's step, without a queue."""
    network = nn.Sequential(copy_of_model(method.encoder.backbone), deepcopy(method.encoder.head))
    prototypes, config = deepcopy(method.prototypes), method.config

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))
        crops = [views.flatten(0, 1) for views in batch.views.values()]
        embeddings = F.normalize(network[1](torch.cat([network[0](views) for views in crops])), dim=1)
        scores = prototypes(embeddings).split(batch.views["global"].shape[1])
        codes = [assignment(crop.detach(), config.epsilon, config.sinkhorn_iterations) for crop in scores[:2]]
        return mean_of(cross_entropy(code, crop / config.temperature) for code, crop in pairs(codes, scores))

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


Loss = Callable[[MultiCropViT, MultiCropViT, TeacherTargets, TeacherTargets, Batch], Tensor]
"""Of student and teacher with their targets for class tokens and for patches."""


def ibot_loss(
    student: MultiCropViT, teacher: MultiCropViT, of_classes: TeacherTargets, of_patches: TeacherTargets, batch: Batch
) -> Tensor:
    """main_ibot.py's: heads see all tokens of all crops, the patches' loss is computed whole and then masked."""
    large, masks = batch.views["global"].flatten(0, 1), batch.masks["global"]
    with torch.no_grad():
        logits = teacher.head(teacher.tokens(large))
        classes, patches = logits[:, 0], logits[:, 1:]
        class_targets, patch_targets = of_classes.of(classes).chunk(2), of_patches.of(patches).chunk(2)
    own = student.head(student.tokens(large, masks.flatten(0, 1)))
    small = student.head(student.tokens(batch.views["local"].flatten(0, 1)))[:, 0]
    crops = (*own[:, 0].chunk(2), *small.split(len(own) // 2))
    class_losses = [cross_entropy(target, crop / STUDENT_TEMPERATURE) for target, crop in pairs(class_targets, crops)]
    patch_losses = []
    for target, crop, mask in zip(patch_targets, own[:, 1:].chunk(2), masks.float(), strict=True):
        each = cross_entropy(target, crop / STUDENT_TEMPERATURE)
        patch_losses.append((each * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1))
    of_classes.update(classes)
    of_patches.update(patches)
    return mean_of(class_losses) + mean_of(patch_losses)


def dinov2_loss(
    student: MultiCropViT, teacher: MultiCropViT, of_classes: TeacherTargets, of_patches: TeacherTargets, batch: Batch
) -> Tensor:
    """ssl_meta_arch.py's: one call of the head for class tokens and masked patches, one head for both, KoLeo."""
    large, mask = batch.views["global"].flatten(0, 1), batch.masks["global"].flatten(0, 1)
    places = mask.flatten().nonzero().flatten()
    with torch.no_grad():
        seen = teacher.tokens(large)
        rows = torch.cat([seen[:, 0], seen[:, 1:].flatten(0, 1).index_select(0, places)])
        classes, patches = teacher.head(rows).split([len(seen), len(places)])
        targets, patch_targets = of_classes.of(classes).chunk(2), of_patches.of(patches)
    own = student.tokens(large, mask)
    small = student.tokens(batch.views["local"].flatten(0, 1))[:, 0]
    rows = torch.cat([small, own[:, 0], own[:, 1:].flatten(0, 1).index_select(0, places)])
    small, classes_of_large, masked = student.head(rows).split([len(small), len(own), len(places)])
    each = [(target, crop) for crop in small.split(len(own) // 2) for target in targets]
    losses = [cross_entropy(target, crop / STUDENT_TEMPERATURE).mean() for target, crop in each]
    swapped = cross_entropy(torch.cat(targets[::-1]), classes_of_large / STUDENT_TEMPERATURE).mean()
    class_loss = (sum(losses) + 2 * swapped) / (len(losses) + 2)
    weights = (1 / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(mask)[mask]
    patch_loss = (cross_entropy(patch_targets, masked / STUDENT_TEMPERATURE) * weights).sum() / len(mask)
    of_classes.update(classes)
    of_patches.update(patches)
    return class_loss + patch_loss + 0.1 * sum(_koleo(crop) for crop in own[:, 0].chunk(2))


def _koleo(tokens: Tensor) -> Tensor:
    rows = F.normalize(tokens, dim=-1)
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(rows, rows[nearest], eps=1e-8) + 1e-8).mean()


@torch.no_grad()
def follow_at_once(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The moving average as DINOv2's code has it: two calls for all parameters."""
    old: list[Tensor] = list(teacher.parameters())
    new: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(old, momentum)
    torch._foreach_add_(old, new, alpha=1 - momentum)


def passes_alone(method: IBOT | DINOv2) -> TrainingStep:
    """Forward and backward of the student's ViT on both sizes and forward of the teacher's, which no code can leave
    out: no head, no loss, and an optimizer that does next to nothing."""
    student = MultiCropViT(method.student.backbone, nn.Identity(), method.mask_token)
    teacher = deepcopy(student).requires_grad_(False)

    def loss(batch: Batch) -> Tensor:
        large, mask = batch.views["global"].flatten(0, 1), batch.masks["global"].flatten(0, 1)
        with torch.no_grad():
            teacher.tokens(large)
        return student.tokens(large, mask).mean() + student.tokens(batch.views["local"].flatten(0, 1)).mean()

    return TrainingStep(loss, torch.optim.SGD(student.parameters(), lr=0.0))


def _step(method: IBOT | DINOv2, *, loss: Loss, follow: Callable[..., None], momentum: float) -> TrainingStep:
    """What both do around the loss: a ViT with mask tokens, and one head for class tokens and patches."""
    student = MultiCropViT(method.student.backbone, method.student.head.classes, method.mask_token)
    teacher = deepcopy(student).requires_grad_(False)
    targets = TeacherTargets(TEACHER_TEMPERATURE), TeacherTargets(TEACHER_TEMPERATURE)
    return TrainingStep(
        partial(loss, student, teacher, *targets),
        adamw(student, lr=5e-4, weight_decay=0.04),
        lambda: nn.utils.clip_grad_norm_(student.parameters(), 3.0),
        lambda: follow(student, teacher, momentum),
    )


official_ibot = partial(_step, loss=ibot_loss, follow=follow_in_a_loop, momentum=0.996)
official_dinov2 = partial(_step, loss=dinov2_loss, follow=follow_at_once, momentum=0.992)

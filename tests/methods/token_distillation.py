"""iBOT, DINOv2 and DINOv3 written out from the papers' equations: whole logits, loops over crops and images."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.backbones.positions import resample_positions
from ssl_pipeline.batch import Batch
from ssl_pipeline.schedule import Progress
from tests.methods.toys import descend, follow
from tests.tiny import VIT, make_batch


def token_method(method, config, backbone=VIT):
    torch.manual_seed(0)
    return method(config, create_backbone(backbone)).double()


def batches(name: str, num_steps: int) -> list[Batch]:
    return [make_batch(name, seed=seed, dtype=torch.float64) for seed in range(num_steps)]


def tokens(model, images, mask=None, mask_token=None):
    """Class token (N, D) and patches (N, L, D) of one of timm's ViTs, masked patches replaced before the positions."""
    patches = model.patch_embed(images)
    grid = patches.shape[1:3]
    patches = patches.flatten(1, 2)
    if mask is not None:
        share = mask[:, :, None].to(patches.dtype)
        patches = (1 - share) * patches + share * mask_token
    patches = patches + resample_positions(model.pos_embed[:, 1:], model.patch_embed.grid_size, grid, antialias=False)
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    out = model.norm(model.blocks(torch.cat([first, patches], dim=1)))
    return out[:, 0], out[:, 1:]


def logits(head, rows):
    """Of a PrototypeHead, its weights normalised by hand."""
    return unit(head.mlp(rows.flatten(0, -2))).unflatten(0, rows.shape[:-1]) @ weights(head.last_layer).T


def weights(layer):
    if isinstance(layer, nn.Linear):
        return layer.weight
    return layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def sinkhorn(scores, epsilon):
    codes = torch.exp(scores / epsilon).T
    codes /= codes.sum()
    for _ in range(3):
        codes /= codes.sum(dim=1, keepdim=True) * len(codes)
        codes /= codes.sum(dim=0, keepdim=True) * codes.shape[1]
    return (codes * codes.shape[1]).T


def cross_entropy(target, prediction):
    return -(target * prediction.log_softmax(dim=-1)).sum(dim=-1)


def patch_loss(targets, predictions, mask):
    """Of all patches (N, L, K): the mean over the masked ones of an image, then over all images."""
    per_image = []
    for target, prediction, masked in zip(targets, predictions, mask, strict=True):
        own = [cross_entropy(target[place], prediction[place]) for place in masked.nonzero().flatten().tolist()]
        per_image.append(sum(own) / len(own) if own else 0 * prediction.sum())
    return sum(per_image) / len(per_image)


def class_loss(targets, predictions, *, same_crop=False, local_weight=1.0):
    """Over the pairs of a teacher's crop (T, B, K) and a student's (S, B, K)."""
    terms = []
    for t in range(len(targets)):
        for s in range(len(predictions)):
            if s != t or same_crop:
                share = 1.0 if s < len(targets) else local_weight
                terms.append(share * cross_entropy(targets[t], predictions[s]).mean())
    return sum(terms) / len(terms)


class Plain:
    """Student and teacher networks beside those of a method, from the same weights."""

    def __init__(self, method):
        parts = [method.student.backbone.model, method.student.head]
        self.student, self.teacher = nn.ModuleList(deepcopy(parts)), nn.ModuleList(deepcopy(parts))
        self.mask_token = deepcopy(method.mask_token)
        kinds = [len(method.centre.value), len(method.patch_centre.value)] if hasattr(method, "centre") else []
        self.centres = [torch.zeros(kind, dtype=torch.float64) for kind in kinds]

    def parameters(self):
        return nn.ParameterList([*self.student.parameters(), self.mask_token])

    def train(self, method, given, loss_of, *, lr):
        """The losses of as many steps as batches; `loss_of` takes this, a batch and the progress."""
        losses = []
        for step, batch in enumerate(given):
            progress = Progress(step, len(given), steps_per_epoch=2)
            loss = loss_of(self, batch, progress)
            parameters = self.parameters()
            parameters.zero_grad()
            loss.backward()
            descend(parameters, lr)
            follow(self.teacher, self.student, method.config.teacher_momentum(progress))
            losses.append(loss.detach())
        return torch.stack(losses)

"""One training step in parts, so that steps of different code can be measured and compared alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.schedule import Progress

# In the middle of a run: nothing is frozen or warming up.
PROGRESS = Progress(step=5000, total_steps=10000, steps_per_epoch=100.0)


def nothing() -> None:
    """For steps without this part."""


@dataclass(frozen=True)
class TrainingStep:
    """Forward (with the loss), what happens to the gradients, the optimizer, and what follows its update."""

    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer
    prepare: Callable[[], None] = nothing
    follow: Callable[[], None] = nothing

    def __call__(self, batch: Batch, *, autocast: bool) -> None:
        """Make one step."""
        device_type = batch.sample_ids.device.type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast):
            loss = self.loss(batch)
        loss.backward()
        self.prepare()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.follow()

    @torch.no_grad()
    def first_loss(self, batch: Batch) -> float:
        """The loss in float32, with the draws of seed 0."""
        torch.manual_seed(0)
        return self.loss(batch).item()


class OurStep:
    """A method as the engine trains it; the parts of a TrainingStep."""

    def __init__(self, method: Method, optim: OptimConfig) -> None:
        self.method, self.optim = method, optim
        self.optimizer = build_optimizer(method, optim)
        self.carry: dict[str, Tensor] = {}

    def parts(self) -> TrainingStep:
        return TrainingStep(self.loss, self.optimizer, self.prepare, self.follow)

    def loss(self, batch: Batch) -> Tensor:
        output = self.method(batch, PROGRESS)
        self.carry = output.carry
        return output.loss

    def prepare(self) -> None:
        write_values(self.optimizer, self.optim, self.optim.lr, PROGRESS)
        prepare_gradients(self.optimizer, self.optim, PROGRESS)

    def follow(self) -> None:
        self.method.after_step([self.carry], PROGRESS)


def copy_of_model(backbone: nn.Module) -> nn.Module:
    """The timm model in a backbone, copied into torch's default memory layout."""
    assert isinstance(backbone, Backbone)
    return deepcopy(backbone.model).to(memory_format=torch.contiguous_format)


def copy_of_vit(backbone: nn.Module) -> VisionTransformer:
    """The timm ViT in a backbone, copied."""
    model = copy_of_model(backbone)
    assert isinstance(model, VisionTransformer)
    return model


def position_table(model: VisionTransformer) -> Tensor:
    """The positions (1, 1 + patches, D) of a ViT that has them."""
    assert model.pos_embed is not None
    return model.pos_embed


def class_token(model: VisionTransformer) -> Tensor:
    """The class token (1, 1, D) of a ViT that has one."""
    assert model.cls_token is not None
    return model.cls_token


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameter by parameter in their order, for networks of one architecture under different names."""
    with torch.no_grad():
        for own, other in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(other.view_as(own))


def decayed_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups with decay on matrices alone, as DINO's and MAE's code makes them."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def everything(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters of all modules."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def follow_in_a_loop(student: Sequence[nn.Module], teacher: Sequence[nn.Module], momentum: float) -> None:
    """The moving average as the official repositories write it: two operations per parameter."""
    for followed, own in zip(student, teacher, strict=True):
        for new, old in zip(followed.parameters(), own.parameters(), strict=True):
            old.data.mul_(momentum).add_((1 - momentum) * new.detach().data)

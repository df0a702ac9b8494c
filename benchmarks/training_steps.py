"""One training step in parts, so that steps of different code can be measured and compared alike."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.schedule import Progress

# In the middle of a run: nothing is frozen or warming up, and no metrics are read.
PROGRESS = Progress(step=5000, total_steps=10000, steps_per_epoch=100.0, is_logged=False)


@dataclass(frozen=True)
class TrainingStep:
    """Forward (with the loss), what happens to the gradients, the optimizer, and what follows its update."""

    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer
    prepare: Callable[[], object] = lambda: None
    follow: Callable[[], object] = lambda: None

    def __call__(self, batch: Batch, autocast: torch.autocast) -> None:
        """Make one step."""
        with autocast:
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


def our_step(method: Method, optim: OptimConfig, optimizer: torch.optim.Optimizer | None = None) -> TrainingStep:
    """A method as the training loop trains it; optimizer: one that is there already."""
    optimizer, carry = optimizer or build_optimizer(method, optim), dict[str, Tensor]()

    def loss(batch: Batch) -> Tensor:
        nonlocal carry
        output = method(batch, PROGRESS)
        carry = output.carry
        return output.loss

    def prepare() -> None:
        write_values(optimizer, optim, optim.lr, PROGRESS)
        prepare_gradients(optimizer, optim, PROGRESS)

    return TrainingStep(loss, optimizer, prepare, lambda: method.after_step([carry], PROGRESS))


def adamw(network: nn.Module, *, lr: float, weight_decay: float, second_beta: float = 0.999) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone, as DINO's and MAE's code makes it."""
    return torch.optim.AdamW(param_groups_weight_decay(network, weight_decay), lr=lr, betas=(0.9, second_beta))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """SGD as MoCo's code has it."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.03, momentum=0.9, weight_decay=5e-4)


@torch.no_grad()
def follow_in_a_loop(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The moving average as the official repositories write it: two operations per parameter."""
    for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
        old.data.mul_(momentum).add_((1 - momentum) * new.detach().data)


def copy_of_model(backbone: Backbone) -> nn.Module:
    """The timm model in a backbone, copied into torch's default memory layout."""
    return deepcopy(backbone.model).to(memory_format=torch.contiguous_format)


def copy_of_vit(backbone: Backbone) -> tuple[VisionTransformer, nn.Parameter, nn.Parameter]:
    """The timm ViT in a backbone, copied; its class token (1, 1, D) and its positions (1, 1 + patches, D)."""
    model = copy_of_model(backbone)
    assert isinstance(model, VisionTransformer)
    assert model.cls_token is not None
    assert model.pos_embed is not None
    return model, model.cls_token, model.pos_embed

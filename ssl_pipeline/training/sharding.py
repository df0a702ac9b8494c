"""A method whose weights are divided among the processes, block by block: FSDP2 (torch's `fully_shard`).

Each process holds its rows of every parameter, of its gradient and of what the optimizer keeps of it. A block of a ViT
is put together when it is computed, and let go of after that; everything outside of blocks is together from the start
of a step to the end of its backward pass. So a method may call any of its parts without knowing about sharding.
Gradients are averaged over the processes, as DDP does.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ssl_pipeline.backbones import Backbone, TokenBackbone
from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import world_size
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.run.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ssl_pipeline.sharded import whole

OLDEST_TORCH = (2, 11)
"""The oldest that was tested and is right: gloo of 2.7 and 2.8 adds gradients up in float32 where it should average
them, and 2.6 shards nothing on a CPU."""
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Blocks are sent and used in bf16 (autocast decides as without sharding); gradients are averaged in float32."""

Part = TypeVar("Part", bound=nn.Module)


def torch_is_too_old() -> bool:
    """Whether this torch does not shard correctly."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH


def check_sharding(method: Method, *, precision: str, measures_classifier: bool, find_lr: bool) -> None:
    """Raises ConfigError if the method, or what is asked for with it, cannot be sharded."""
    name, backbone = type(method).__name__, method.backbone
    if torch_is_too_old():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ConfigError(f"train.parallel=fsdp needs torch {oldest} or newer. This is {torch.__version__}; use ddp.")
    if not isinstance(backbone, TokenBackbone):
        raise ConfigError(
            f"train.parallel=fsdp shards the blocks of a ViT. '{backbone.name}' is not one, and fits on any device: "
            "set train.parallel=ddp."
        )
    if type(method).export is not Method.export:
        raise ConfigError(f"{name} exports more than a backbone, which works only with train.parallel=ddp.")
    if measures_classifier:
        raise ConfigError("The monitor 'classifier' works only with train.parallel=ddp. Leave it out, or use ddp.")
    if find_lr:
        raise ConfigError("find_lr=true works only with train.parallel=ddp.")
    if backbone.config.reversible:
        raise ConfigError("backbone.reversible works only with train.parallel=ddp: it calls parts of blocks.")
    if precision == "fp16":
        raise ConfigError("train.parallel=fsdp works with train.precision=bf16 or no. Got fp16.")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of whatever is called `blocks` in it, in the order of the networks' layers."""
    return [
        block
        for name, part in network.named_modules()
        if name.rpartition(".")[2] == "blocks" and isinstance(part, nn.Sequential | nn.ModuleList)
        for block in part
    ]


class Sharding:
    """Of one method; made while each process still holds all of it, on the CPU."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._backbone = _outline(method.backbone)
        self._classifier = _outline(method.classifier) if method.classifier is not None else None

    def share_out(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        *,
        device: torch.device,
        precision: str,
        compiled: bool,
    ) -> torch.optim.Optimizer:
        """Shard the method, which moves to the device; returns an optimizer for the shards, with the state of this one.

        compiled: whether each block goes through torch.compile.
        """
        state = optimizer_tensors(optimizer)
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = BF16 if precision == "bf16" else MixedPrecisionPolicy()
        for block in blocks_of(self._method):
            if compiled:
                block.forward = torch.compile(block.forward, dynamic=False)  # inside of the hooks that gather
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self._method, mesh=mesh, mp_policy=policy)
        self._method.to(device)  # buffers, and networks that are no part of the method's state
        sharded = build_optimizer(self._method, config)
        load_optimizer_tensors(sharded, state)
        return sharded

    def backbone(self) -> Backbone:
        """A whole copy of the evaluated backbone as it is now; all processes call it together."""
        return _gathered(self._method.backbone, self._backbone)

    def classifier(self) -> nn.Linear | None:
        """The same of the classifier, where the method has one."""
        if self._classifier is None or self._method.classifier is None:
            return None
        return _gathered(self._method.classifier, self._classifier)


def _outline(part: Part) -> Part:
    """A copy whose parameters have no values."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in part.parameters()
    }
    return deepcopy(part, memo)


def _gathered(part: Part, outline: Part) -> Part:
    """A copy of the outline with the values of the sharded part, on its device."""
    filled = deepcopy(outline)
    filled.load_state_dict({name: whole(tensor.detach()) for name, tensor in part.state_dict().items()}, assign=True)
    return filled.to(next(part.parameters()).device)

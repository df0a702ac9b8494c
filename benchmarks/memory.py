"""python -m benchmarks.memory recipe=NAME [processes=1,8,64] [key=value ...]: what a step of a recipe needs, counted.

Nothing is computed: weights and images have shapes alone (torch's meta device, and fake tensors for autocast). What a
forward pass keeps for the backward pass is counted storage by storage, with attention as a fused kernel keeps it.
Not counted: what a kernel needs while it runs, the allocator's gaps, and torch itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.backbones.memory_format import without_values
from ssl_pipeline.backbones.positions import _cached_matrix
from ssl_pipeline.batch import Batch
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, InRange, run_command
from ssl_pipeline.eval.measures import format_table
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.schedule import Progress
from ssl_pipeline.training.sharding import blocks_of

GB = 1e9
FLOAT32 = 4  # bytes
ADAM_AVERAGES = 2


@dataclass(frozen=True)
class Held:
    """Bytes on one process: from step to step, on top of it while a step runs, and for the backward pass."""

    weights: int
    """All parameters and buffers, those of teachers too, in float32."""
    gradients: int
    averages: int
    """AdamW's two."""
    gathered: int
    """What is put together of sharded weights at once, with its gradients: all outside of blocks, and two blocks."""
    activations: int


def method_without_values(config: PretrainConfig) -> Method:
    """The recipe's method on the meta device."""
    with torch.device("meta"):
        return build_method(config.method, create_backbone(config.backbone))


def held(method: Method, *, activations: int, num_processes: int, sharded: bool, bf16: bool) -> Held:
    """What each of `num_processes` holds of a method; `activations`: of `kept_for_backward`."""
    share = num_processes if sharded else 1
    of_all, of_trained = (sum(_rows(p, share) for p in of) for of in (method.parameters(), trained_of(method)))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in method.buffers())
    gathered = 0
    if share > 1:
        in_blocks = [list(block.parameters()) for block in blocks_of(method)]
        members = {id(parameter) for block in in_blocks for parameter in block}
        outside = [parameter for parameter in method.parameters() if id(parameter) not in members]
        largest = max((sum(parameter.numel() for parameter in block) for block in in_blocks), default=0)
        numbers = sum(p.numel() * (2 if p.requires_grad else 1) for p in outside) + 3 * largest
        gathered = numbers * (2 if bf16 else FLOAT32)
    return Held(
        weights=FLOAT32 * of_all + buffers,
        gradients=FLOAT32 * of_trained,
        averages=ADAM_AVERAGES * FLOAT32 * of_trained,
        gathered=gathered,
        activations=activations,
    )


def trained_of(method: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def _rows(parameter: Tensor, share: int) -> int:
    """Elements that the first of so many processes holds: the largest part."""
    return parameter.numel() if share == 1 else -(-len(parameter) // share) * parameter[0].numel()


def kept_for_backward(method: Method, config: PretrainConfig) -> int:
    """Bytes that the forward pass of one process keeps for its backward pass, beside the parameters themselves."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        network = without_values(method, lambda tensor: torch.empty_like(tensor, device="cpu"))
        batch = batch_of(network, config)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        kept: dict[int, Any] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no other one gets its number
            return tensor

        def note_input(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():  # what checkpointed activations keep of a block
                note(given[0])

        for block in blocks_of(network):
            block.register_forward_pre_hook(note_input)
        bf16 = config.train.precision != "no"
        with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = network(batch, Progress(step=0, total_steps=2, steps_per_epoch=1))
            assert output.loss.requires_grad
            size_in_bytes = sum(storage.nbytes() for storage in kept.values())
    _cached_matrix.cache_clear()  # of tensors without values
    return size_in_bytes


def batch_of(method: Method, config: PretrainConfig) -> Batch:
    """Images of the recipe's sizes; as many masked patches as there are on average. Values are zeros."""
    size = config.data.batch_size
    views, masks, masked = {}, {}, {}
    for needed in method.needs:
        if needed.labelled:
            raise ConfigError(f"{type(method).__name__} reads labelled images, which are not counted here.")
        if needed.name not in config.augment:
            continue
        group = config.augment[needed.name]
        side = max(group.sizes)
        views[needed.name] = torch.zeros(group.count, size, 3, side, side)
        if needed.mask is not None:
            shape = (group.count, size, (side // needed.mask.patch_size) ** 2)
            count = round(math.prod(shape) * needed.mask.probability * np.mean(needed.mask.ratio))
            masks[needed.name] = (torch.arange(math.prod(shape)) < count).view(shape)
            masked[needed.name] = torch.arange(count)
    numbers = torch.zeros(size, dtype=torch.long)
    return Batch(views, numbers, numbers, masks, None, masked)


class _Fused(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, the result and a float32 number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, torch.empty(query.shape[:-1]))
        return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        return _Fused.apply(query, key, value)

    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch("ssl_pipeline.backbones.attention._half_precision", return_value=False),
        mock.patch("ssl_pipeline.backbones.reversible._draws", return_value=False),  # seeds need values
    ):
        yield


class MemoryConfig(PretrainConfig):
    """What a step of a recipe needs on each process, in gigabytes: counted, nothing is computed."""

    processes: tuple[Annotated[int, InRange(ge=1)], ...] = (1, 8, 64)
    """Numbers of processes that share the work."""


def table(config: MemoryConfig) -> str:
    """Gigabytes on each process, a line for each number of processes and layout."""
    method = method_without_values(config)
    bf16 = config.train.precision == "bf16"
    activations = kept_for_backward(method, config)
    trained, every = (sum(p.numel() for p in of) / 1e6 for of in (trained_of(method), method.parameters()))
    rows = []
    for number, sharded in [(1, False)] + [(n, s) for n in config.processes if n > 1 for s in (False, True)]:
        of = astuple(held(method, activations=activations, num_processes=number, sharded=sharded, bf16=bf16))
        layout = "fsdp" if sharded else "ddp" if number > 1 else "-"
        rows.append([str(number), layout, *(f"{size / GB:.2f}" for size in (*of, sum(of)))])
    about = (
        f"{config.method.name}, {config.backbone.name}: {trained:.0f} M trained parameters, {every:.0f} M in all; "
        f"{config.data.batch_size} images on each process, precision {config.train.precision}"
    )
    titles = ["processes", "layout", *(field.name for field in fields(Held)), "total (GB on each)"]
    return f"{about}\n{format_table(titles, rows)}"


def command(argv: Sequence[str] | None = None) -> int:
    return run_command(
        MemoryConfig,
        lambda config: print(table(config)),
        command="python -m benchmarks.memory",
        argv=argv,
        recipes=RECIPES,
    )


if __name__ == "__main__":
    sys.exit(command())

"""Nothing in a step makes the host wait for the device: no value is read back, no size depends on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pipeline.batch import Batch
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.schedule import Schedule
from tests.tiny import CNN, CONFIGS, VIT, make_batch, make_method, progress_at, takes_cnn

WAITS = {  # on CUDA
    "_local_scalar_dense",  # .item(), .tolist(), float(), bool(), int()
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
    "bincount",
    "is_nonzero",
    "equal",
    "allclose",
    "lift_fresh",  # torch.tensor(number), new_tensor, an index that is a list: a copy from the host
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # by booleans: by nonzero
OPTIMIZERS = {
    "adamw": {"clip_norm": 0.1, "clip_each": True},
    "sgd": {"clip_norm": 0.1},
    "lars": {},
}


class RefuseToWait(TorchDispatchMode):
    """Raises at an operation that would make the host wait if its tensors were on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
        by_booleans = name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        assert name not in WAITS, f"{function} makes the host wait"
        assert not by_booleans, f"{function} by booleans makes the host wait"
        return function(*args, **(kwargs or {}))


class RefuseToRead(TorchFunctionMode):
    """Raises where numbers leave a tensor without an operation of its own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reads = function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        assert not reads, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))


@contextmanager
def cpu_refuses_to_wait() -> Iterator[None]:
    with RefuseToRead(), RefuseToWait():
        yield


@contextmanager
def cuda_refuses_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def settings(name: str) -> OptimConfig:
    lr, decay = Schedule(value=0.01, final=0.0, warmup=2), Schedule(value=0.1, final=0.4)
    return OptimConfig(name=name, lr=lr, weight_decay=decay, **OPTIMIZERS[name])


def step(method: Method, batches: list[Batch], optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    progress = progress_at(2)
    outputs = [method(batch, progress) for batch in batches]
    for output in outputs:
        (output.loss / len(outputs)).backward()
    write_values(optimizer, config, config.lr, progress)
    prepare_gradients(optimizer, config, progress)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        method.after_step([output.carry for output in outputs], progress)


def check(name: str, backbone, optimizer_name: str, device: str, waits, **autocast) -> None:
    method = make_method(name, backbone=backbone).to(device)
    config = settings(optimizer_name)
    optimizer = build_optimizer(method, config)
    batches = [to(make_batch(name, seed=seed), device) for seed in (0, 1)]
    with torch.autocast(device, **autocast):
        step(method, batches, optimizer, config)  # makes the optimizer's state and the tables of positions
        with waits:
            step(method, batches, optimizer, config)


def to(batch: Batch, device: str) -> Batch:
    labelled = to(batch.labelled, device) if batch.labelled is not None else None
    views = {name: views.to(device) for name, views in batch.views.items()}
    masks = {name: masks.to(device) for name, masks in batch.masks.items()}
    masked = {name: batch.masked_patches(name).to(device) for name in batch.masks}  # the data path finds them, too
    labels, sample_ids = batch.labels.to(device), batch.sample_ids.to(device)
    return replace(
        batch, views=views, labels=labels, sample_ids=sample_ids, labelled=labelled, masks=masks, masked=masked
    )


CASES = [(name, VIT, "adamw") for name in sorted(CONFIGS)]
CASES += [(name, CNN, "sgd") for name in sorted(CONFIGS) if takes_cnn(name)] + [("byol", CNN, "lars")]


@pytest.mark.parametrize(("name", "backbone", "optimizer"), CASES)
def test_no_operation_of_a_step_would_wait(name, backbone, optimizer):
    check(name, backbone, optimizer, "cpu", cpu_refuses_to_wait(), enabled=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backbone", "optimizer"), CASES)
def test_no_step_on_a_gpu_waits(name, backbone, optimizer):
    check(name, backbone, optimizer, "cuda", cuda_refuses_to_wait(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x[[0, 2]],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x * torch.tensor(2.0),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.__setitem__(x > 0, x[:2]),
    ],
)
def test_what_waits_is_noticed(wait):
    values = torch.tensor([1.0, -2.0, 3.0])
    with cpu_refuses_to_wait(), pytest.raises(AssertionError, match="makes the host wait"):
        wait(values)

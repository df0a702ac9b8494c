"""The few collectives that losses and methods need; without a process group each is the identity."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_pipeline.config import ConfigError, RunError, failure_sentence, launched_processes

SECONDS_TO_JOIN = 1800.0  # as torch gives processes on CPUs
SECONDS_BETWEEN_LOOKS = 0.02
LONGEST_TOLD = 400  # bytes of an error that other processes receive


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Inside the block the processes that torchrun has started are one group; a single process has none."""
    if launched_processes() < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    join_processes("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def join_processes(backend: str) -> None:
    """Make the processes that a launcher has started one group; does nothing where they are one already.

    torchrun's agent keeps a store for them that outlives them. Processes that it restarts after a lost node would
    read the addresses that the dead ones left there, and hang (https://github.com/pytorch/pytorch/issues/135712), so
    each start writes under a name of its own. Under another launcher the first process keeps the store. Signals are
    taken while processes are waited for, which torch does not do.
    """
    if dist.is_initialized():
        return
    number, host, port = launched_processes(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own_rank = int(os.environ["RANK"])
    keeps_it = own_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = timedelta(seconds=SECONDS_TO_JOIN)
    shared = dist.TCPStore(host, port, number, is_master=keeps_it, timeout=until, wait_for_workers=False)
    store = store_of_this_start(shared, own_rank, number)
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=number)


def store_of_this_start(
    store: dist.Store, own_rank: int, number: int, *, seconds: float = SECONDS_TO_JOIN
) -> dist.PrefixStore:
    """The store under a name that no earlier start of these processes has used; all ranks return the same.

    Each asks by a name drawn now, and the first answers every name with its own. Names of dead processes are still
    there: their answers are never read, so the first goes on until each rank says that it has one. Raises ConfigError
    after `seconds`.
    """
    own, until = uuid4().hex, time.monotonic() + seconds
    if own_rank > 0:
        store.set(f"asks/{own_rank}", own)
        while not store.check([f"answer/{own}"]):  # store.wait would take no signal meanwhile
            if time.monotonic() >= until:
                raise ConfigError(
                    f"The first process has not answered rank {own_rank} for {seconds:g} s. Was it started, and is it "
                    "running?"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        first = store.get(f"answer/{own}").decode()
        store.set(f"joined/{first}/{own_rank}", "")
        return dist.PrefixStore(first, store)
    while missing := [other for other in range(1, number) if not store.check([f"joined/{own}/{other}"])]:
        if time.monotonic() >= until:
            raise ConfigError(
                f"{len(missing)} of {number} processes have not come for {seconds:g} s; the first of them is rank "
                f"{missing[0]}. Were they started, and are they running?"
            )
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return dist.PrefixStore(own, store)


@torch.no_grad()
def gather(local: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world_size * B, ...) in rank order, without gradient; all ranks bring one shape."""
    if world_size() == 1:
        return local.detach()
    local = local.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    """All-gather whose backward sums the gradients that all ranks hold for this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        ctx.num_rows = local.shape[0]  # type: ignore[attr-defined]
        return gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(gradient)
        return gradient.narrow(0, rank() * ctx.num_rows, ctx.num_rows)  # type: ignore[attr-defined]


def gather_with_grad(local: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world_size * B, ...) in rank order; gradients flow back to every rank.

    The backward pass *sums* over ranks. A loss that is the mean over a rank's own rows therefore has, after DDP's
    average over ranks, exactly the gradient of the loss over the global batch.
    """
    return local if world_size() == 1 else _GatherWithGrad.apply(local)


@torch.no_grad()
def mean_over_ranks(local: Tensor) -> Tensor:
    """The element-wise mean of a tensor that every rank holds, without gradient."""
    if world_size() == 1:
        return local.detach()
    total = local.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def max_over_ranks(local: Tensor) -> Tensor:
    """The element-wise maximum of a tensor that every rank holds."""
    if world_size() > 1:
        local = local.clone()
        dist.all_reduce(local, op=dist.ReduceOp.MAX)
    return local


def wait_for_all(device: torch.device | str) -> None:
    """Return once all processes have come here."""
    max_over_ranks(torch.zeros((), device=device)).item()


@torch.no_grad()
def logsumexp_over_ranks(local: Tensor) -> Tensor:
    """The element-wise log of the sum of exp over the tensors of all ranks, the same on each.

    Two sums of the tensor's size are sent, whatever the number of ranks; a gather would send one for each of them.
    """
    if world_size() == 1:
        return local.detach()
    largest = max_over_ranks(local).clamp_(min=torch.finfo(local.dtype).min)  # of ranks without rows it is -inf
    total = (local - largest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(largest)


@torch.no_grad()
def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, by that of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def bytes_of_first_rank(own: bytes, device: torch.device | str) -> bytes:
    """What rank 0 calls this with, on all ranks."""
    if world_size() == 1:
        return own
    length = torch.tensor([len(own)], device=device)
    copy_from_first_rank([length])
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if rank() == 0:
        content.copy_(torch.tensor([*own], dtype=torch.uint8))
    copy_from_first_rank([content])
    return bytes(content.tolist())


@contextmanager
def failing_together(device: torch.device | str) -> Iterator[None]:
    """An error that one process meets inside is raised by all of them after the block: none waits for a process that
    gave up. The others raise a RunError with its words. The block must hold no collective.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = failure_sentence(error).encode()[:LONGEST_TOLD] if error is not None else b""
    texts = gather(torch.tensor([*told.ljust(LONGEST_TOLD, b"\0")], dtype=torch.uint8, device=device)).cpu()
    if error is not None:
        raise error
    for number, text in enumerate(texts.view(world_size(), LONGEST_TOLD)):
        words = bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore")
        if words:
            raise RunError(f"On rank {number}: {words}")


def peer_failure(error: Exception) -> RunError | None:
    """The one-line form of what a collective raises when another process is gone; None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or world_size() == 1:
        return None
    if not isinstance(error, dist.DistError) and "gloo" not in text and "Gloo" not in text:
        return None
    return RunError("Another process of this run has ended; its own error, if it could give one, is in the output.")

"""`train.deterministic`: the same bits from the same start, also on a GPU, where kernels may add in any order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssl_pipeline.config import RunError

WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # what makes cuBLAS repeat itself; read when CUDA starts
COST = "deterministic: torch's deterministic algorithms; slower on a GPU, where an operation that has none ends the run"
REFUSAL = "does not have a deterministic implementation"  # in the words of torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms inside of the block, and before it what was set there before."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, FIXED)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def explain_nondeterminism(error: Exception) -> RunError | None:
    """What an operation without a deterministic form means for a run, None for any other error."""
    if not (isinstance(error, RuntimeError) and REFUSAL in str(error)):
        return None
    operation = str(error).strip().split(" ")[0]
    return RunError(
        f"train.deterministic=true: torch has no deterministic form of {operation} on this device. Set "
        "train.deterministic=false, or choose a method or backbone without it."
    )

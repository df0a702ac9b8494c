"""GPUs, and the collectives that connect processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from ssl_pipeline.commands.installation.finding import Finding, reason

DRIVER = Path("/proc/driver/nvidia/version")
SIDE, CHANNELS = 32, 8
GIB = 1 << 30
LEAST_MEMORY = 4 * GIB
OTHER_BUILD = "Install torch for your driver: https://pytorch.org/get-started/locally"


def check_gpus() -> Iterator[Finding]:
    """Whether torch sees the GPUs that are there, and computes on each what a run computes."""
    build = f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"
    has_driver = DRIVER.exists() or shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if not has_driver:
            yield Finding("ok", "GPU", f"none ({build}); runs use CPUs")
        elif torch.version.cuda is None:
            yield Finding("wrong", "GPU", f"there is a driver, but {build}", OTHER_BUILD)
        else:
            told = f"there is a driver, but torch does not see a GPU ({build})"
            advice = f"Look at nvidia-smi and CUDA_VISIBLE_DEVICES; is the driver older than this CUDA? {OTHER_BUILD}"
            yield Finding("wrong", "GPU", told, advice)
        return
    for number in range(torch.cuda.device_count()):
        yield _check_gpu(number, build)


def _check_gpu(number: int, build: str) -> Finding:
    what, device = f"GPU {number}", torch.device("cuda", number)
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(device)
        _train_a_step(device)
    except Exception as error:  # of CUDA, cuDNN or the driver
        return Finding("wrong", what, f"{reason(error)} ({build})", OTHER_BUILD)
    bf16 = torch.cuda.is_bf16_supported()
    told = (
        f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {'bf16' if bf16 else 'no bf16'}; {build}"
    )
    if free < LEAST_MEMORY:
        return Finding("note", what, told, "Something else uses its memory (nvidia-smi), or it is small for training.")
    return Finding("ok" if bf16 else "note", what, told, "" if bf16 else "Use train.precision=fp16.")


def _train_a_step(device: torch.device) -> None:
    """A convolution and a product, forward and backward, and the wait for both: cuDNN and cuBLAS."""
    images = torch.ones(2, 3, SIDE, SIDE, device=device)
    layer, head = torch.nn.Conv2d(3, CHANNELS, 3, device=device), torch.nn.Linear(CHANNELS, 2, device=device)
    head(layer(images).mean(dim=(2, 3))).sum().backward()
    torch.cuda.synchronize(device)


def check_collectives() -> Iterator[Finding]:
    """A sum over a group of only this process: NCCL where there are GPUs, Gloo elsewhere."""
    with_gpus = torch.cuda.is_available()
    if not distributed.is_available():
        yield Finding("wrong", "several processes", "this torch was built without torch.distributed", OTHER_BUILD)
        return
    if with_gpus and not distributed.is_nccl_available():
        yield Finding("wrong", "several GPUs", "this torch was built without NCCL", OTHER_BUILD)
        return
    backend = "nccl" if with_gpus else "gloo"
    version = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if with_gpus else ""
    try:
        _sum_alone(backend, "cuda" if with_gpus else "cpu")
    except Exception as error:
        advice = "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 switch off what often fails."
        yield Finding("wrong", "several processes", f"{backend}: {reason(error)}", advice if with_gpus else "")
        return
    yield Finding("ok", "several processes", f"{backend}{version}, tried in one process")


def _sum_alone(backend: str, device: str) -> None:
    if distributed.is_initialized():  # by whoever launched this
        distributed.all_reduce(torch.ones(1, device=device))
        return
    with tempfile.TemporaryDirectory(prefix="ssl_pipeline-") as place:
        distributed.init_process_group(backend, init_method=f"file://{place}/group", rank=0, world_size=1)
        try:
            distributed.all_reduce(torch.ones(1, device=device))
        finally:
            distributed.destroy_process_group()

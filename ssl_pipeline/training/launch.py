"""Processes, devices and the seeds of what is random in a model."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from ssl_pipeline.config import ConfigError
from ssl_pipeline.training.parallel import DDP
from ssl_pipeline.training.run import TrainConfig


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of the processes and devices; raises ConfigError if it differs from the launcher's."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched > 1 and missing:
        raise ConfigError(
            f"The environment has WORLD_SIZE={launched}, but no {', '.join(missing)}. "
            "Launch with: torchrun --standalone --nproc-per-node N pretrain.py ..."
        )
    has_gpu = torch.cuda.is_available()
    if config.precision == "fp16" and not has_gpu:
        raise ConfigError("train.precision=fp16 needs a GPU, and there is none here. Try train.precision=no or bf16.")
    accelerator = Accelerator(
        cpu=not has_gpu,
        mixed_precision=config.precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DDP],
    )
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"The launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}. "
            "On CPUs launch with: torchrun --standalone --nproc-per-node N pretrain.py ..."
        )
    return accelerator

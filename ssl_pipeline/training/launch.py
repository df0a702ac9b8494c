"""Processes, devices and precision: what the launcher gives, and what only the recipe decides."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import join_processes
from ssl_pipeline.machine import keep_freed_memory
from ssl_pipeline.training.meeting import require_one_version, wait_for_the_first
from ssl_pipeline.training.parallel import DDP
from ssl_pipeline.training.run import TrainConfig

PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
USE_CPU = "ACCELERATE_USE_CPU"
KEPT = {USE_CPU, "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}  # where a run computes, not what
NEUTRAL = {"", "no", "none", "false", "0", "default"}
COMPILED = {True: "compiled", False: "not compiled", "auto": "compiled where that is worth it"}
UNSET = "Launch with torchrun or accelerate launch, or unset it."
KEYS = {  # of the settings that do what a variable asks for
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.accumulate",
    "ACCELERATE_GRADIENT_CLIPPING": "optim.clip_norm",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
}


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of the processes and devices; raises ConfigError if it differs from the launcher's.

    The precision is the config's, also where this process has had an Accelerator before, and whatever the environment
    says: such variables are deleted, so call `ignored_variables`, which names them, before.
    """
    launched = _launched(os.environ)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if launched > 1 and missing:
        raise ConfigError(
            f"The environment has WORLD_SIZE={launched}, but no {', '.join(missing)}. "
            "Launch with: torchrun --standalone --nproc-per-node N pretrain.py ..."
        )
    on_cpu = not torch.cuda.is_available() or _asks_for_cpu(os.environ)
    if config.precision == "fp16" and on_cpu:
        raise ConfigError("train.precision=fp16 needs a GPU, and there is none here. Try train.precision=no or bf16.")
    for name in [name for name in os.environ if name.startswith(PREFIXES) and name not in KEPT]:
        del os.environ[name]
    if launched > 1:
        wait_for_the_first(os.environ)
        join_processes("gloo" if on_cpu else "nccl")
    AcceleratorState._reset_state()  # the processes stay; precision and plugins are those of this run
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.precision,
        dynamo_backend="no",  # train.compile compiles the parts that the method names
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DDP],
    )
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"The launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}. "
            "On CPUs launch with: torchrun --standalone --nproc-per-node N pretrain.py ..."
        )
    require_one_version(accelerator.device)
    if on_cpu:
        keep_freed_memory()
    return accelerator


def _launched(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started; raises ConfigError if its variables are not numbers, or do not fit."""
    number = _number(environment, "WORLD_SIZE", "1", least=1)
    if number > 1:
        for name in ("RANK", "LOCAL_RANK"):
            if _number(environment, name, "0", least=0) >= number:
                raise ConfigError(
                    f"The environment has {name}={environment[name]}, which must be below WORLD_SIZE={number}. {UNSET}"
                )
    return number


def _number(environment: Mapping[str, str], name: str, default: str, *, least: int) -> int:
    text = environment.get(name, default).strip()
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"The environment has {name}={text}, which must be a whole number from {least} on. {UNSET}")
    return int(text)


def ignored_variables(environment: Mapping[str, str], config: TrainConfig) -> list[str]:
    """What variables of Accelerate ask for and a run does not do, "NAME=VALUE" each, with the key that does it.

    `accelerate launch` sets them by its options and its default_config.yaml; some are left over in a shell.
    """
    used = {
        "ACCELERATE_MIXED_PRECISION": config.precision,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(config.accumulate),
    }
    ignored = []
    for name, value in sorted(environment.items()):
        asks = value.strip().lower() not in {*NEUTRAL, used.get(name, "")}
        if asks and name.startswith(PREFIXES) and name not in KEPT:
            key = f" (set {KEYS[name]} instead)" if name in KEYS else ""
            ignored.append(f"{name}={value}{key}")
    return ignored


def describe_launch(accelerator: Accelerator, config: TrainConfig) -> str:
    """On what and how a run computes, in one line."""
    number = accelerator.num_processes
    device = f"{accelerator.device.type}{f' ({USE_CPU})' if _asks_for_cpu(os.environ) else ''}"
    if accelerator.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(accelerator.device)}"
    precision = "float32" if config.precision == "no" else config.precision
    return (
        f"{number} process{'es' if number > 1 else ''} on {device}, precision {precision}, "
        f"{config.accumulate} micro-batch{'es' if config.accumulate > 1 else ''} per step, "
        f"{_layout(number, config)}, "
        f"{COMPILED[config.compile]}"
    )


def _layout(num_processes: int, config: TrainConfig) -> str:
    if num_processes > 1:
        return "a share of the weights on each (FSDP2)" if config.parallel == "fsdp" else "whole weights on each (DDP)"
    return "no sharding" + (" (train.parallel=fsdp needs several processes)" if config.parallel == "fsdp" else "")


def _asks_for_cpu(environment: Mapping[str, str]) -> bool:
    return environment.get(USE_CPU, "").strip().lower() in {"1", "true", "yes", "on", "y", "t"}

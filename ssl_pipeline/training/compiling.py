"""Whether the network of a run is compiled, and what `train.compile=auto` means on this device."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from ssl_pipeline.config import printable

Setting = bool | Literal["auto"]

WORTH_IT = 1000  # steps: compiling takes a minute or two, which a shorter run does not win back


def compile_decision(setting: Setting, device: torch.device, *, steps: int) -> tuple[bool, str]:
    """Whether to compile, and why not; `auto` compiles on a GPU where torch.compile works, for WORTH_IT steps or more.

    steps: those that this start has still to make.
    """
    if setting != "auto":
        return setting, ""
    if device.type != "cuda":
        return False, "auto compiles only on GPUs"
    if steps < WORTH_IT:
        return False, f"auto compiles for {WORTH_IT:,} steps or more"
    failure = _failure_on(device)
    return not failure, failure


@cache
def _failure_on(device: torch.device) -> str:
    """What torch.compile says of a small function on the device; empty if it works."""
    try:
        compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
        compiled(torch.zeros(8, device=device))
    except Exception as error:  # they share no type: no triton, no C compiler, a compiler bug
        first = next(iter(str(error).strip().splitlines()), "")
        return f"torch.compile fails here: {type(error).__name__}: {printable(first)}"
    return ""

"""Whether the network of a run is compiled, what `train.compile=auto` means on this device, and how compiled parts get
past what a killed start has left in torch.compile's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import nn

from ssl_pipeline.config import printable

Setting = bool | Literal["auto"]
P = ParamSpec("P")
R = TypeVar("R")

HALF_WRITTEN = re.compile(  # what the system's loader says of a library that ends early
    r"(/\S+\.so): (?:file too short|invalid ELF header|cannot read file data|ELF load command past end of file)"
)

WORTH_IT = 5000  # steps of a run: compiling takes a minute or two, which a shorter one does not win back


def compile_part(part: nn.Module) -> None:
    """Let torch compile the part at its first call; each crop size by itself, else the second would be dynamic."""
    part.compile(dynamic=False)
    compiled = part._compiled_call_impl
    assert compiled is not None
    part._compiled_call_impl = past_half_written(compiled)


def past_half_written(compiled: Callable[P, R]) -> Callable[P, R]:
    """`compiled`, called once more where torch's cache has a library that was never written to its end.

    A start that is killed while it compiles leaves such a file, and each later one would end at it. The file is
    removed, and torch makes it anew; nothing has been computed before.
    """

    @wraps(compiled)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # inside of a larger part
            return compiled(*args, **kwargs)
        while True:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if not _remove_half_written(error):
                    raise

    return call


def _remove_half_written(error: Exception) -> bool:
    """Remove the library of torch's cache that the error says is cut short; whether there was one."""
    found = HALF_WRITTEN.search(str(error))
    if found is None:
        return False
    library, own = Path(found[1]), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    in_cache = any(folder.name.startswith("torchinductor") for folder in library.parents)
    if not (in_cache or (own and library.is_relative_to(own))):
        return False
    try:
        library.unlink()
    except OSError:
        return False
    told = f"{library} in torch.compile's cache was cut short, by a start that was killed; it is made anew."
    print(printable(told), flush=True)
    return True


def compile_decision(setting: Setting, device: torch.device, *, steps: int) -> tuple[bool, str]:
    """Whether to compile, and why not; `auto` compiles on a GPU where torch.compile works, for WORTH_IT steps or more.

    steps: those of the whole run, so that a start that goes on computes as the one before it.
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
        compiled = past_half_written(torch.compile(lambda x: x.sin() + 1, fullgraph=True))
        compiled(torch.zeros(8, device=device))
    except Exception as error:  # they share no type: no triton, no C compiler, a compiler bug
        first = next(iter(str(error).strip().splitlines()), "")
        return f"torch.compile fails here: {type(error).__name__}: {printable(first)}"
    return ""

"""Whether the network and the colours of a run are compiled, what `train.compile=auto` means on this device, and what a
killed start has left in torch.compile's cache."""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ssl_pipeline.config import printable

Setting = bool | Literal["auto"]

WORTH_IT = 5000  # steps of a run: compiling takes a minute or two, which a shorter one does not win back
STILL_WRITTEN = 3.0  # seconds after its last change in which another run may still be writing a file
ELF_HEADER = 64  # bytes, of a library for a 64-bit processor
ELF_LITTLE_ENDIAN = b"\x7fELF\x02\x01"


def remove_half_written() -> None:
    """Remove the libraries of torch's cache that were never written to their end, with a line for each.

    A start that is killed while it compiles leaves such a file, and each later one would end at it, by an error or by
    the system without a word.
    """
    from torch._inductor.codecache import cache_dir  # seconds to import, and whoever compiles needs it

    for library in sorted(Path(cache_dir()).rglob("*.so")):
        with suppress(OSError):  # of another user, or gone by now
            if time.time() - library.stat().st_mtime > STILL_WRITTEN and _is_cut_short(library):
                library.unlink()
                told = f"{library} in torch.compile's cache was cut short, by a start that was killed; it is made anew."
                print(printable(told), flush=True)


def _is_cut_short(library: Path) -> bool:
    """Whether the file ends before its table of sections does, which is the last thing in it."""
    with library.open("rb") as file:
        header = file.read(ELF_HEADER)
    if len(header) < ELF_HEADER or not any(header):
        return True
    if not header.startswith(ELF_LITTLE_ENDIAN):
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return table + size * count > library.stat().st_size


def compiles_colours(device: torch.device, *, steps: int) -> bool:
    """Whether the colours of views are compiled: on a GPU, in a run of WORTH_IT steps or more."""
    return device.type == "cuda" and steps >= WORTH_IT


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
        compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
        compiled(torch.zeros(8, device=device))
    except Exception as error:  # they share no type: no triton, no C compiler, a compiler bug
        first = next(iter(str(error).strip().splitlines()), "")
        return f"torch.compile fails here: {type(error).__name__}: {printable(first)}"
    return ""

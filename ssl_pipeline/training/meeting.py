"""The processes of a run find each other, and are of one kind: told in a sentence, before anything is trained."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from ssl_pipeline import __version__
from ssl_pipeline.config import ConfigError, launched_rank
from ssl_pipeline.distributed import gather, world_size
from ssl_pipeline.files import sha256_of_bytes

PACKAGE = Path(__file__).parents[1]
SECONDS_FOR_THE_FIRST = 300.0  # it may still be importing torch from a slow file system
SECONDS_BETWEEN_TRIES = 1.0
LONGEST_VERSION = 120  # bytes


def wait_for_the_first(environment: Mapping[str, str], *, seconds: float = SECONDS_FOR_THE_FIRST) -> None:
    """Return once the first process answers where the launcher says that it is; ConfigError if it does not.

    torch itself would wait for half an hour, and end with a traceback.
    """
    if launched_rank(environment) == "0":
        return
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    until, answer = time.monotonic() + seconds, "no answer"
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(until - time.monotonic(), 0.1)):
                return
        except socket.gaierror:
            raise ConfigError(
                f"MASTER_ADDR={host} is the name of no host that this node knows. Give torchrun an --rdzv-endpoint "
                "that all nodes can resolve, or an address in numbers."
            ) from None
        except (OSError, ValueError) as error:
            answer = str(error)
        if time.monotonic() >= until:
            raise ConfigError(
                f"The first process does not answer at {host}:{port} for {seconds:g} s ({answer}). Is it running, and "
                f"may this node ({socket.gethostname()}) reach that port? NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
                "choose the network."
            ) from None
        time.sleep(SECONDS_BETWEEN_TRIES)


def require_one_version(device: torch.device) -> None:
    """Raise ConfigError, on all processes, if one runs other code, or another torch, than the first."""
    if world_size() == 1:
        return
    own = version().encode()[:LONGEST_VERSION].ljust(LONGEST_VERSION, b"\0")
    found = gather(torch.tensor([*own], dtype=torch.uint8, device=device)).view(world_size(), -1).cpu()
    versions = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in found]
    others = [rank for rank, one in enumerate(versions) if one != versions[0]]
    if others:
        raise ConfigError(
            f"All processes must run the same code. Rank {others[0]} has {versions[others[0]]}, rank 0 has "
            f"{versions[0]} ({len(others)} of {world_size()} processes differ). Install the same version on all nodes."
        )


def version() -> str:
    """The version of this package with a digest of its files, and that of torch."""
    return f"ssl-pipeline {__version__} ({_digest_of(PACKAGE)}), torch {torch.__version__}"


@cache
def _digest_of(folder: Path) -> str:
    """The first digits of a SHA-256 of the names and contents of the Python files in a folder."""
    files = sorted(folder.rglob("*.py"))
    parts = (part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))
    return sha256_of_bytes(*parts)[:8]

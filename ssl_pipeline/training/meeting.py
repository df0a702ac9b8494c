"""Whether all processes of a run reach each other and have the same code, settings and images, before training."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from ssl_pipeline import __version__
from ssl_pipeline.config import Config, ConfigError, launched_rank
from ssl_pipeline.config.arguments import leaves
from ssl_pipeline.distributed import bytes_of_first_rank, failing_together, gather, rank, world_size
from ssl_pipeline.files import sha256_of_bytes

PACKAGE = Path(__file__).parents[1]
SECONDS_FOR_THE_FIRST = 300.0  # it may still be importing torch from a slow file system
SECONDS_BETWEEN_TRIES = 1.0
LONGEST_VERSION = 120  # bytes
OF_A_NODE = {"recipe", "images", "output", "data.cache_dir", "data.cache_gb", "data.workers", "data.prefetch"}
PLACES = {"shards", "keep", "labels", "weights", "tokenizer", "train", "val"}  # the same images by another name


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
                f"MASTER_ADDR={host} is not a host name that this node knows. Give torchrun an --rdzv-endpoint "
                "that all nodes can resolve, or a numeric address."
            ) from None
        except (OSError, ValueError) as error:
            answer = str(error)
        if time.monotonic() >= until:
            raise ConfigError(
                f"The first process does not answer at {host}:{port} for {seconds:g} s ({answer}). Is it running, and "
                f"can this node ({socket.gethostname()}) reach that port? NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
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


def require_same_settings(config: Config, device: torch.device) -> None:
    """Raise on all processes if one has other settings than the first, except those that may differ between nodes.

    ConfigError where they differ, RunError with its words elsewhere.
    """
    if world_size() == 1:
        return
    own = {key: value for key, value in leaves(config.model_dump(mode="json")) if not _is_of_a_node(key)}
    first = json.loads(bytes_of_first_rank(json.dumps(own).encode(), device))
    differing = [key for key in {**first, **own} if first.get(key) != own.get(key)]
    with failing_together(device):
        if differing:
            key = differing[0]
            more = f" ({len(differing)} settings differ)" if len(differing) > 1 else ""
            raise ConfigError(
                f"All processes must have the same settings. {key} is {json.dumps(own.get(key))} on rank {rank()} and "
                f"{json.dumps(first.get(key))} on rank 0{more}. Start all nodes with the same command."
            )


def require_same(what: str, place: str, fingerprint: str, device: torch.device) -> None:
    """Raise on all processes if the images or the weights of one are not those of the first, by their fingerprint.

    what: what they are called; place: where this process has them.
    """
    first = bytes_of_first_rank(fingerprint.encode(), device).decode()
    with failing_together(device):
        if first != fingerprint:
            raise ConfigError(
                f"All processes must have the same {what}. Those of {place} on rank {rank()} have the fingerprint "
                f"{fingerprint[:8]}, on rank 0 it is {first[:8]}. Copy them to this node again."
            )


def _is_of_a_node(key: str) -> bool:
    return key in OF_A_NODE or key.rpartition(".")[2] in PLACES


def version() -> str:
    """The version of this package with a digest of its files, and that of torch."""
    return f"ssl-pipeline {__version__} ({_digest_of(PACKAGE)}), torch {torch.__version__}"


@cache
def _digest_of(folder: Path) -> str:
    """The first digits of a SHA-256 of the names and contents of the Python files in a folder."""
    files = sorted(folder.rglob("*.py"))
    parts = (part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))
    return sha256_of_bytes(*parts)[:8]

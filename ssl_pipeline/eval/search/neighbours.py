"""Exact nearest neighbours by inner product: FAISS, or blocks where the hardware multiplies shorter formats fast."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.search.blocks import SEARCH_MEMORY, block_neighbours
from ssl_pipeline.eval.search.coarse import INT8_DIMS

Search = Literal["auto", "faiss", "blocks"]
ChosenSearch = Literal["faiss", "blocks"]

ENOUGH_QUERIES = 1000  # in a FAISS call; with a few hundred it multiplies vector by vector, 18x slower per query
# With one of them the float32 products of blocks take 0.27 to 0.49 of FAISS's time (AVX-512, 5,000 to 200,000 images of
# 128 to 2,048 dimensions), and 2.4 times as long where all features are the same. With more, other processes hold up
# the many small parallel parts of blocks: on a busy machine they took 2.7 times as long as FAISS.
ONE_THREAD = 1
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
INT8_FLAGS = {"amx_int8", "avx512_vnni", "avx_vnni"}
WORTH_INT8 = 2000  # training images for each of the k neighbours; with fewer, its many candidates cost what it saves

# Axes: M training images, N queries, D feature dimensions, K neighbours.


def nearest_neighbours(train_MD: Tensor, test_ND: Tensor, *, k: int, search: Search = "auto") -> tuple[Tensor, Tensor]:
    """Similarities and training image numbers (N, k), most similar first, found exactly on the device of `test_ND`.

    `faiss` is the flat index of FAISS, on the CPU. `blocks` scores in int8 or bfloat16 where there are units for them
    and in float32 elsewhere, then decides in float32 (see `blocks`); of equally similar images the lower number comes
    first. `auto` takes blocks on a GPU, on CPUs with such units or with a single thread, and for fewer than 1,000
    queries.
    """
    require_k(k, len(train_MD))
    require_finite(train_MD, what="training images")
    require_finite(test_ND, what="test images")
    formats = coarse_formats(test_ND.device, *train_MD.shape, k=k)
    if choose_search(search, test_ND.device, formats, num_queries=len(test_ND)) == "faiss":
        return faiss_neighbours(train_MD, test_ND, k=k)
    return block_neighbours(train_MD.to(test_ND.device), test_ND, k=k, formats=formats)


def other_neighbours(
    features_MD: Tensor, *, k: int, asked_N: Tensor | None = None, search: Search = "auto"
) -> tuple[Tensor, Tensor]:
    """Similarities and numbers (N, k) of the nearest *other* images of images of one set: of all, or of `asked_N`."""
    if asked_N is None:
        asked_N = torch.arange(len(features_MD), device=features_MD.device)
    similarities_NK, neighbours_NK = nearest_neighbours(features_MD, features_MD[asked_N], k=k + 1, search=search)
    dropped_NK = neighbours_NK == asked_N.to(neighbours_NK.device)[:, None]
    dropped_NK[:, -1] |= ~dropped_NK.any(dim=1)  # among many copies an image may not find itself
    return similarities_NK[~dropped_NK].view(-1, k), neighbours_NK[~dropped_NK].view(-1, k)


def coarse_formats(device: torch.device, num_train: int, dim: int, *, k: int) -> tuple[torch.dtype, ...]:
    """The formats of coarse scores that pay on this device for so many images, the fastest and coarsest first."""
    worth_int8 = num_train >= WORTH_INT8 * k and dim in INT8_DIMS
    int8 = (torch.int8,) if has_int8_units(device) and worth_int8 else ()
    bfloat16 = (torch.bfloat16,) if has_bfloat16_units(device) else ()
    return *int8, *bfloat16, torch.float32


def choose_search(
    search: Search, device: torch.device, formats: tuple[torch.dtype, ...], *, num_queries: int
) -> ChosenSearch:
    """What `auto` means on this device with these formats of coarse scores; anything else is itself."""
    if search != "auto":
        return search
    few = num_queries < ENOUGH_QUERIES or torch.get_num_threads() == ONE_THREAD
    return "blocks" if device.type != "cpu" or formats[0] != torch.float32 or few else "faiss"


def faiss_neighbours(train_MD: Tensor, test_ND: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """FAISS's exhaustive search, all queries in one call: it works in tiles of some MB and copies no feature."""
    import faiss

    test, train = (features.float().contiguous().cpu().numpy() for features in (test_ND, train_MD))
    similarities, neighbours = faiss.knn(test, train, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarities).to(test_ND.device), torch.from_numpy(neighbours).to(test_ND.device)


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 matrices multiply faster than float32 ones: GPUs since Ampere, CPUs by their flags."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _has_cpu_units(device, BFLOAT16_FLAGS)


def has_int8_units(device: torch.device) -> bool:
    """Whether a CPU multiplies int8 matrices faster than others: by its flags."""
    return _has_cpu_units(device, INT8_FLAGS)


def _has_cpu_units(device: torch.device, flags: set[str]) -> bool:
    """Whether it is a CPU with one of these flags, and PyTorch has the library that uses them."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and bool(cpu_flags() & flags)


@cache
def cpu_flags() -> frozenset[str]:
    """What the kernel says that the CPU can do; nothing on systems without /proc/cpuinfo."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def search_device(train_MD: Tensor, test_ND: Tensor, device: torch.device | str) -> torch.device:
    """`device` where it is a GPU with room for the features, their coarse copy and the search; else the CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.device("cpu")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    needed = 10 * train_MD.numel() + 8 * test_ND.numel() + 2 * SEARCH_MEMORY  # float32 twice, for normalising
    return device if needed <= free else torch.device("cpu")


def require_k(k: int, num_train: int) -> None:
    """Raises ConfigError if there are not k training images."""
    if not 1 <= k <= num_train:
        raise ConfigError(f"k-NN needs k between 1 and the number of training images ({num_train}). Got k={k}.")


def require_finite(features_ND: Tensor, *, task: str = "k-NN", what: str = "images") -> None:
    """Raises ConfigError if a feature is NaN or infinite; `what` the rows are of."""
    if features_ND.sum(dim=1).isfinite().all():  # then each is: a tenth of the time of asking all of them
        return
    broken = int((~features_ND.isfinite()).any(dim=1).sum())
    if broken:
        raise ConfigError(f"{task} needs finite features: {broken} of {len(features_ND)} {what} have NaN or infinity.")

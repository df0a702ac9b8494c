from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from ssl_pipeline.eval.search import neighbours as module
from ssl_pipeline.eval.search.neighbours import (
    choose_search,
    coarse_formats,
    cpu_flags,
    has_bfloat16_units,
    has_int8_units,
    nearest_neighbours,
    search_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("num_queries", [3, 1200])
def test_all_searches_find_the_same(num_queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (normalize(torch.randn(count, 16, generator=generator), dim=1) for count in (900, num_queries))
    expected = (test.double() @ train.double().T).topk(30)
    for search in ("faiss", "blocks", "auto"):
        similarities, neighbours = nearest_neighbours(train, test, k=30, search=search)
        torch.testing.assert_close(similarities.double(), expected.values, rtol=1e-6, atol=1e-6)
        assert (neighbours == expected.indices).double().mean() > 0.999  # the order of all but equal ones


@pytest.mark.parametrize(
    ("device", "fastest", "threads", "num_queries", "expected"),
    [
        (CPU, torch.float32, 2, 1000, "faiss"),
        (CPU, torch.float32, 1, 1000, "blocks"),
        (CPU, torch.float32, 2, 999, "blocks"),  # FAISS would search vector by vector
        (CPU, torch.bfloat16, 2, 50_000, "blocks"),
        (CPU, torch.int8, 2, 50_000, "blocks"),
        (GPU, torch.bfloat16, 2, 50_000, "blocks"),
        (GPU, torch.float32, 2, 50_000, "blocks"),  # faiss-cpu would copy the features to the host
    ],
)
def test_auto_follows_the_hardware_and_the_number_of_queries(
    device: torch.device,
    fastest: torch.dtype,
    threads: int,
    num_queries: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    formats = (fastest, torch.float32)
    assert choose_search("auto", device, formats, num_queries=num_queries) == expected
    assert choose_search("faiss", device, formats, num_queries=num_queries) == "faiss"
    assert choose_search("blocks", device, formats, num_queries=num_queries) == "blocks"


@pytest.mark.parametrize(
    ("flags", "bfloat16", "int8"),
    [
        ("amx_bf16 amx_int8", True, True),
        ("avx512_bf16", True, False),
        ("avx512_vnni", False, True),
        ("avx_vnni", False, True),
        ("avx2", False, False),
        (None, False, False),
    ],
)
def test_the_flags_of_a_cpu_say_which_formats_it_multiplies_fast(
    flags: str | None, bfloat16: bool, int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {flags} avx\n\nprocessor\t: 1\n")
    monkeypatch.setattr(module, "CPU_INFO", tmp_path / "cpuinfo")
    cpu_flags.cache_clear()
    assert (has_bfloat16_units(CPU), has_int8_units(CPU)) == (bfloat16, int8)
    finer = (torch.bfloat16, torch.float32) if bfloat16 else (torch.float32,)
    assert coarse_formats(CPU, 40_000, 384, k=20) == ((torch.int8, *finer) if int8 else finer)
    assert coarse_formats(CPU, 39_999, 384, k=20) == finer  # too few images for what int8 costs
    assert coarse_formats(CPU, 40_000, 1, k=20) == finer  # PyTorch does not multiply these
    cpu_flags.cache_clear()


def test_a_cpu_searches_where_its_features_are() -> None:
    assert search_device(torch.ones(3, 2), torch.ones(1, 2), "cpu") == CPU


@pytest.mark.gpu
def test_features_too_large_for_the_gpu_are_searched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = torch.ones(3, 2), torch.ones(1, 2)
    assert search_device(train, test, "cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**36))
    assert search_device(train, test, "cuda") == CPU

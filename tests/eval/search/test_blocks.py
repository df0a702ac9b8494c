import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pipeline.eval.search.blocks import (
    SEARCH_MEMORY,
    block_neighbours,
    exhaustive_neighbours,
    plan_search,
)
from ssl_pipeline.eval.search.coarse import CoarseFeatures, lowest_scores, scale_of

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
KINDS = [
    "random",
    "clustered",
    "duplicates",
    "equal",
    "collapsed",
    "sorted by cluster",
    "long and short",
    "heavy tails",
]


def features_of(kind: str, *, num_train: int = 1501, num_test: int = 60, dim: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, dim, generator=generator) for count in (num_train, num_test))
    if kind in ("clustered", "sorted by cluster"):
        centres = torch.randn(7, dim, generator=generator)
        train = centres[torch.randint(0, 7, (num_train,), generator=generator)] + 0.1 * train
        test = centres[torch.randint(0, 7, (num_test,), generator=generator)] + 0.1 * test
    if kind == "sorted by cluster":
        train = train[(normalize(train, dim=1) @ test[0]).argsort()]
    if kind == "duplicates":
        train = train[torch.randint(0, 30, (num_train,), generator=generator)]
    if kind == "equal":
        train = train[:1].repeat(num_train, 1)
    if kind == "collapsed":
        train, test = 1 + 1e-2 * train, 1 + 1e-2 * test
    if kind == "long and short":
        return train * torch.rand(num_train, 1, generator=generator) ** 4, 3 * test
    if kind == "heavy tails":  # a few large values, and a dimension that is larger than all others
        train, test = train**5, test**5
        train[:, 3], test[:, 3] = 100 * train[:, 3], 100 * test[:, 3]
    return normalize(train, dim=1), normalize(test, dim=1)


def brute_force(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Float64, then rounded: equal rows may differ in its last digit; of equal ones the lower number first."""
    best = (test.double() @ train.double().T).float().sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


def recall(train: Tensor, test: Tensor, neighbours: Tensor, k: int) -> float:
    """Share of the neighbours that are among the k best, up to the last digit of a float32 product."""
    kth = brute_force(train, test, k)[0][:, -1:].double()
    similarities = (test.double() @ train.double().T).gather(1, neighbours)
    digit = 2e-7 * float(test.norm(dim=1).max() * train.norm(dim=1).max())
    return float((similarities >= kth - digit).double().mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_recall_is_one(kind: str, dtype: torch.dtype) -> None:
    train, test = features_of(kind)
    for k in (1, 20, 200):
        similarities, neighbours = block_neighbours(train, test, k=k, formats=[dtype])
        assert recall(train, test, neighbours, k) == 1.0
        assert all(len(set(row)) == k for row in neighbours.tolist())
        torch.testing.assert_close(similarities.double(), brute_force(train, test, k)[0].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_image_can_be_a_neighbour(dtype: torch.dtype) -> None:
    train, test = features_of("random", num_train=37, num_test=5)
    _, neighbours = block_neighbours(train, test, k=37, formats=[dtype])
    assert torch.equal(neighbours.sort(dim=1).values, torch.arange(37).expand(5, 37))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_images_the_first_are_taken(dtype: torch.dtype) -> None:
    few = torch.eye(4)
    train = few[torch.arange(2000) % 4]  # 500 of each, more than the candidates of k=3 and fewer than those of k=100
    for k in (3, 100):
        _, neighbours = block_neighbours(train, few, k=k, formats=[dtype])
        assert torch.equal(neighbours, torch.stack([torch.arange(first, first + 4 * k, 4) for first in range(4)]))


def test_the_exhaustive_search_is_the_stable_sort() -> None:
    train, test = features_of("duplicates")
    similarities, neighbours = exhaustive_neighbours(train, test, k=90, memory=1)
    expected, numbers = brute_force(train, test, 90)
    torch.testing.assert_close(similarities, expected)
    assert torch.equal(neighbours, numbers)


@pytest.mark.parametrize("num_train", [1501, 9001])
@pytest.mark.parametrize(("dtype", "worst"), [(torch.bfloat16, 0.02), (torch.int8, 0.2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_coarse_scores_lie_within_their_error(kind: str, dtype: torch.dtype, worst: float, num_train: int) -> None:
    train, test = features_of(kind, num_train=num_train)
    coarse = CoarseFeatures.of(train, dtype)
    rounded, error = coarse.round_queries(test)
    test = test * scale_of(test.abs().amax(dim=1, keepdim=True))
    scores, error = rounded.double() @ coarse.rows.double().T, error.double()
    if coarse.steps is not None:
        assert max(rounded.abs().max(), coarse.rows.abs().max()) == 127  # the whole range
        step = (test * coarse.steps).abs().amax(dim=1).double() / 127
        scores, error = scores * step[:, None], error * step
    mean = train[:: -(-num_train // 4096)].mean(dim=0)
    scale = scale_of(train.abs().max())
    assert 0.5 <= (scale * train.abs().max()) < 1
    true = test.double() @ ((train - mean) * scale).double().T
    assert ((scores - true).abs() <= error[:, None]).all()
    assert (error <= worst * scale * test.norm(dim=1) * train.norm(dim=1).max()).all()  # and is worth knowing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_lowest_score_is_two_errors_and_its_own_rounding_below(dtype: torch.dtype) -> None:
    kth, half_step = torch.tensor([1.0, -1.0], dtype=dtype), torch.finfo(dtype).eps / 2
    assert torch.equal(lowest_scores(kth, torch.zeros(2)), torch.tensor([1 - half_step, -1 - half_step]).to(dtype))
    assert (lowest_scores(kth, torch.tensor([0.25, 0.25])) <= kth - 0.5).all()
    assert (lowest_scores(kth, torch.tensor([0.25, 0.25])) >= kth - 0.505).all()


def test_the_lowest_count_is_two_errors_below() -> None:
    kth = torch.tensor([100, -100, 5], dtype=torch.int32)
    lowest = lowest_scores(kth, torch.tensor([10.2, 10.2, 1e20]))
    assert lowest.tolist() == [80, -120, torch.iinfo(torch.int32).min]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_neighbour_on_a_circle_is_missed(dtype: torch.dtype, seed: int) -> None:
    """Of two dimensions the errors of coarse scores come close to their bound."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (normalize(torch.randn(count, 2, generator=generator), dim=1) for count in (2000, 200))
    _, neighbours = block_neighbours(train, test, k=3, formats=[dtype])
    assert recall(train, test, neighbours, 3) == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("train_scale", "test_scale"), [(1.0, 1e-24), (1e-20, 1.0), (1e-17, 1e-17), (1e18, 1e19)])
def test_lengths_whose_squares_are_no_float32_numbers(
    dtype: torch.dtype, train_scale: float, test_scale: float
) -> None:
    train, test = features_of("random", num_train=3000, dim=64)
    expected = block_neighbours(train, test, k=2, formats=[torch.float32])[1]
    test[::2] = test[::2] * test_scale
    similarities, neighbours = block_neighbours(train * train_scale, test, k=2, formats=[dtype])
    assert (neighbours == expected).double().mean() > 0.98  # but for equal ones
    true = (test.double()[:, None] * (train * train_scale).double()[neighbours]).sum(dim=2)
    torch.testing.assert_close(similarities.double(), true, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_train", [2, 40, 100, 257])
def test_few_images_that_scores_do_not_tell_apart(num_train: int, dtype: torch.dtype) -> None:
    test = features_of("random", dim=8, num_test=300)[1]
    large = features_of("random", dim=8, num_train=num_train)[0]
    large[1] *= 1e20
    outlier = torch.ones(num_train, 8)
    outlier[1] = torch.tensor([3e37, -3e37] * 4)
    for train in (torch.ones(num_train, 8), torch.zeros(num_train, 8), large, outlier):
        similarities, neighbours = block_neighbours(train, test, k=2, formats=[dtype])
        found = train.double()[neighbours]
        digit = 1e-6 * test.double().norm(dim=1)[:, None] * found.norm(dim=2)
        true = (test.double()[:, None] * found).sum(dim=2)
        assert ((similarities - true).abs() <= digit).all()
        assert (true >= brute_force(train, test, 2)[0] - digit).all()
        assert (neighbours[:, 0] != neighbours[:, 1]).all()


def test_int8_of_one_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^int8 takes 2 to 133143 dimensions\. Got 1\.$"):
        CoarseFeatures.of(torch.ones(3, 1), torch.int8)


def test_a_format_that_leaves_too_many_candidates_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    of = CoarseFeatures.of
    monkeypatch.setattr(CoarseFeatures, "of", lambda train, dtype: [taken.append(dtype), of(train, dtype)][1])
    formats = [torch.int8, torch.bfloat16, torch.float32]
    for kind, expected in (("clustered", formats), ("random", formats[:1])):
        train, test = features_of(kind, num_train=20_000, num_test=600)
        taken.clear()
        similarities, neighbours = block_neighbours(train, test, k=5, formats=formats)
        assert taken == expected
        exact = block_neighbours(train, test, k=5, formats=[torch.float32])
        assert torch.equal(neighbours, exact[1])
        assert torch.equal(similarities, exact[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cut_into_queries_changes_nothing(dtype: torch.dtype) -> None:
    train, test = features_of("clustered")
    whole, parts = (block_neighbours(train, test, k=20, formats=[dtype], memory=memory) for memory in (2**30, 2**18))
    torch.testing.assert_close(whole[0], parts[0], rtol=0, atol=0)
    assert torch.equal(whole[1], parts[1])


def test_no_query_has_no_neighbours() -> None:
    similarities, neighbours = block_neighbours(torch.eye(3), torch.empty(0, 3), k=2, formats=[torch.float32])
    assert similarities.shape == neighbours.shape == (0, 2)


@pytest.mark.parametrize("k", [20, 200])
@pytest.mark.parametrize("dim", [384, 2048])
def test_imagenet_fits_a_gibibyte(k: int, dim: int) -> None:
    for itemsize, least in ((2, 200), (4, 100)):
        plan = plan_search(1_281_167, dim, k=k, itemsize=itemsize, rescored=2**21, memory=SEARCH_MEMORY)
        assert plan.bytes <= SEARCH_MEMORY
        assert plan.queries >= least
        assert plan.columns >= 1_281_167
        assert plan.columns // math.prod(plan.sizes) >= k


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen: set[int] = set()

    def release(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.held -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen and storage.nbytes():
                    self.seen.add(storage.data_ptr())
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self.release, storage.data_ptr(), storage.nbytes())
        return outputs


@pytest.mark.parametrize("formats", [*([dtype] for dtype in DTYPES), DTYPES[::-1]], ids=str)
@pytest.mark.parametrize(("kind", "dim"), [("random", 24), ("clustered", 24), ("duplicates", 24), ("equal", 1000)])
def test_temporary_tensors_stay_within_the_memory(kind: str, dim: int, formats: list[torch.dtype]) -> None:
    train, test = features_of(kind, num_train=20_000 * 24 // dim, num_test=256, dim=dim)
    memory = 2**23
    with PeakBytes() as counted:
        block_neighbours(train, test, k=20, formats=formats, memory=memory)
    copies = train.nbytes if formats == [torch.float32] else 2 * train.nbytes  # made before the search, or besides it
    results = 3 * test.shape[0] * 20 * 12
    assert memory // 8 < counted.peak <= memory + copies + results


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_the_same(kind: str) -> None:
    train, test = features_of(kind)
    for k in (1, 20, 200):
        _, neighbours = block_neighbours(train.cuda(), test.cuda(), k=k, formats=[torch.bfloat16])
        assert recall(train, test, neighbours.cpu(), k) == 1.0

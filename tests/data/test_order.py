import numpy as np
import pytest
from numpy.testing import assert_array_equal

from ssl_pipeline.data.order import CACHED_BLOCKS, CACHED_EPOCHS, Order, rank_positions
from ssl_pipeline.randomness import generate, hash64, permutation, splitmix64, uniforms

COUNTS = (3, 5, 0, 7, 2, 6)
GOLDEN_UNIFORMS = [0.6649563339280757, 0.20865216202007741, 0.3871065677957318]
GOLDEN_ORDER = [10, 13, 8, 11, 5, 7, 9, 12, 6, 3, 4, 14, 0, 19, 21, 18, 1, 17, 22, 2, 20, 16, 15]
GOLDEN_PERMUTATION = [5, 7, 8, 2, 9, 0, 3, 1, 6, 4]


def test_splitmix64_has_the_published_outputs() -> None:
    # the first outputs for seed 1234567, as every implementation of SplitMix64 lists them
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert generate(1234567, 4).tolist() == published
    assert splitmix64(0).item() == 0xE220A8397B1DCDAF


def splitmix64_in_python(x: int) -> int:
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_hash_is_a_chain_of_splitmix64() -> None:
    chained = splitmix64_in_python(splitmix64_in_python(splitmix64_in_python(7) ^ 1) ^ 2**63)
    assert hash64(7, 1, 2**63).item() == chained
    assert hash64([7, 8], 1, 2**63)[0] == chained


def test_the_order_of_samples_never_changes() -> None:
    # golden vectors: a run that is resumed with a newer version must see the same samples
    assert permutation(10, 0).tolist() == GOLDEN_PERMUTATION
    assert Order(COUNTS, seed=5, block_shards=2).locate(range(23))[1].tolist() == GOLDEN_ORDER
    assert uniforms(5, 1, [4], views=1, count=3).ravel().tolist() == GOLDEN_UNIFORMS


@pytest.mark.parametrize("block_shards", [1, 2, 4, 100])
def test_each_epoch_has_every_sample_once(block_shards: int) -> None:
    epochs, samples = Order(COUNTS, seed=3, block_shards=block_shards).locate(np.arange(3 * 23))
    assert_array_equal(epochs, np.repeat([0, 1, 2], 23))
    orders = samples.reshape(3, 23)
    assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(23), (3, 1)))
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 4), (4, 2), (8, 1), (2, 3), (4, 5)])
def test_ranks_share_an_epoch_without_overlap(world_size: int, batch_size: int) -> None:
    order = Order(COUNTS, seed=3, block_shards=2)
    step = world_size * batch_size
    positions = [
        rank_positions(start, rank=rank, world_size=world_size, batch_size=batch_size)
        for start in range(0, 23 * step, step)
        for rank in range(world_size)
    ]
    samples = order.locate(np.concatenate(positions))[1]
    assert_array_equal(np.bincount(samples), np.full(23, step))


def test_positions_can_be_asked_in_any_order() -> None:
    forwards = Order(COUNTS, seed=1, block_shards=2).locate(np.arange(200))[1]
    backwards = Order(COUNTS, seed=1, block_shards=2).locate(np.arange(200)[::-1])[1]
    one_by_one = Order(COUNTS, seed=1, block_shards=2)
    assert_array_equal(forwards, backwards[::-1])
    assert_array_equal(forwards, [one_by_one.locate([position])[1][0] for position in range(200)])


def test_a_block_is_read_from_its_own_shards_only() -> None:
    shard_of = np.repeat(np.arange(6), COUNTS)
    samples = Order(COUNTS, seed=1, block_shards=1).locate(np.arange(23))[1]
    assert np.count_nonzero(np.diff(shard_of[samples])) == 4  # five shards with samples, one after the other


def test_the_cache_of_blocks_stays_small() -> None:
    order = Order(np.full(100, 3), seed=0, block_shards=1)
    order.locate(np.arange(3000))
    assert len(order._blocks) <= 4
    assert len(order._epochs) <= 2


def memory_of(order: Order) -> int:
    """Bytes of every array that an order holds."""
    shards = [array for arrays in order._epochs.values() for array in arrays]
    return sum(array.nbytes for array in [order.counts, order._first_sample, *shards, *order._blocks.values()])


def test_a_block_is_all_that_grows_with_the_samples() -> None:
    # 16 thousand and 16 million samples in shards of 1,000
    few, many = (Order(np.full(shards, 1000), seed=0) for shards in (16, 16_000))
    for order in (few, many):
        for start in (0, 7, 15_990, 3 * order.num_samples - 5):
            assert len(order.locate(np.arange(start, start + 64))[1]) == 64
        assert all(len(block) <= 16_000 for block in order._blocks.values())
    per_shard = (1 + 1 + CACHED_EPOCHS * (1 + 1 / 16)) * 8
    assert memory_of(many) - memory_of(few) <= per_shard * (16_000 - 16) + CACHED_BLOCKS * 16_000 * 8


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_rank_reads_its_share_of_an_epoch_and_no_more(world_size: int) -> None:
    counts = np.full(50, 64)
    batch_size = 3200 // world_size // 4
    shares = []
    for rank in range(world_size):
        order, read = Order(counts, seed=2), []
        for start in range(0, 3200, batch_size * world_size):
            positions = rank_positions(start, rank=rank, world_size=world_size, batch_size=batch_size)
            read.append(order.locate(positions)[1])
        shares.append(np.concatenate(read))
        assert len(shares[-1]) == 3200 // world_size
    assert_array_equal(np.sort(np.concatenate(shares)), np.arange(3200))


def test_uniforms_belong_to_the_sample_not_to_the_batch() -> None:
    batch = uniforms(9, [0, 0, 1], [5, 6, 5], views=4, count=3)
    assert batch.shape == (4, 3, 3)
    assert_array_equal(batch[:, 1:2], uniforms(9, 0, [6], views=4, count=3))
    assert_array_equal(batch[:, 2:], uniforms(9, [1], [5], views=4, count=3))
    assert_array_equal(batch[:2], uniforms(9, [0, 0, 1], [5, 6, 5], views=2, count=3))
    assert len(np.unique(batch)) == batch.size
    assert not np.isin(uniforms(9, [0, 0, 1], [5, 6, 5], views=4, count=3, stream=1), batch).any()
    assert not np.isin(uniforms(8, [0, 0, 1], [5, 6, 5], views=4, count=3), batch).any()


def test_uniforms_are_uniform() -> None:
    numbers = uniforms(0, 0, np.arange(2000), views=5, count=10).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    # chi-square with 19 degrees of freedom: 43.8 is exceeded once in a thousand times
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


def test_an_order_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], seed=0)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie in"):
        rank_positions(0, rank=2, world_size=2, batch_size=4)

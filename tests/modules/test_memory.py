"""The queue of features, the centre, and distributions over classes."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.modules.memory import Centre, FeatureQueue, MovingDistribution, RecentDistribution
from tests.methods.test_no_sync import cpu_refuses_to_wait
from tests.ranks import run_on_ranks


def numbered(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)


def test_the_oldest_features_are_replaced_in_order():
    queue = FeatureQueue(6, 2)
    for batch in ((1, 2), (3, 4), (5, 6), (7, 8)):
        queue.enqueue(numbered(*batch))
    assert queue.features[:, 0].tolist() == [7, 8, 3, 4, 5, 6]
    assert queue.position.item() == 2


def test_a_batch_of_the_whole_size_replaces_everything():
    queue = FeatureQueue(3, 2)
    queue.enqueue(numbered(1, 2, 3))
    assert queue.features[:, 0].tolist() == [1, 2, 3]
    assert queue.position.item() == 0


def test_the_queue_starts_with_random_directions():
    queue = FeatureQueue(5, 8)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(5))
    assert not torch.equal(queue.features[0], queue.features[1])


def test_the_state_dict_holds_features_and_position():
    queue, other = FeatureQueue(4, 2), FeatureQueue(4, 2)
    queue.enqueue(numbered(1, 2))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(numbered(3, 4))
    assert torch.equal(queue.features, other.features)
    assert other.position.dtype == torch.int64


def test_the_queue_keeps_no_graph():
    queue = FeatureQueue(4, 2)
    queue.enqueue(torch.ones(2, 2, requires_grad=True) * 2)
    assert not queue.features.requires_grad


@pytest.mark.parametrize("num_features", [0, 3, 8])
def test_a_batch_that_does_not_divide_the_size_is_refused(num_features):
    queue = FeatureQueue(4, 2)
    with pytest.raises(ValueError, match=f"Got 4 places and {num_features} features"):
        queue.enqueue(torch.ones(num_features, 2))


def test_the_queue_is_full_when_every_place_was_replaced_also_after_a_resume():
    queue = FeatureQueue(6, 2)
    found = [queue.full]
    for batch in ((1, 2), (3, 4)):
        queue.enqueue(numbered(*batch))
        found.append(queue.full)
    resumed, copy = nn.Sequential(FeatureQueue(6, 2)), deepcopy(queue)
    resumed.load_state_dict(nn.Sequential(queue).state_dict())
    for each in (queue, resumed[0], copy):
        assert not each.full
        each.enqueue(numbered(5, 6))
        assert each.full
        each.enqueue(numbered(7, 8))
        assert each.full
    again = FeatureQueue(6, 2)
    again.load_state_dict(queue.state_dict())
    assert again.full
    again.load_state_dict(FeatureQueue(6, 2).state_dict())
    assert not again.full
    assert found == [False] * 3


# The centre


def test_the_centre_is_a_moving_mean_of_the_rows():
    centre = Centre(2)
    assert centre.value.tolist() == [0, 0]
    centre.update(torch.tensor([4.0, 8.0]), num_rows=4, momentum=0.75)
    assert centre.value.tolist() == [0.25, 0.5]
    centre.update(torch.tensor([2.0, 2.0]), num_rows=torch.tensor(1), momentum=0.5)
    assert centre.value.tolist() == [1.125, 1.25]
    assert list(centre.state_dict()) == ["value"]


def test_without_a_row_the_centre_stays():
    centre = Centre(2)
    centre.update(torch.tensor([4.0, 8.0]), num_rows=4, momentum=0.75)
    centre.update(torch.zeros(2), num_rows=0, momentum=0.75)
    assert centre.value.tolist() == [0.25, 0.5]


def centre_of_a_share(counts):
    logits = torch.arange(2.0 * sum(counts)).reshape(-1, 2)
    mine = logits.split(counts)[rank()] if world_size() > 1 else logits
    centre = Centre(2)
    for _ in range(2):
        centre.update(mine.sum(dim=0), num_rows=len(mine), momentum=0.9)
    return centre.value


@pytest.mark.parametrize("counts", [(1, 4), (5, 0)])
def test_the_centre_of_two_processes_counts_every_row_alike(counts):
    first, second = run_on_ranks(centre_of_a_share, counts)
    assert torch.equal(first, second)
    assert_close(first, centre_of_a_share(counts))
    means = [part.mean(dim=0) for part in torch.arange(10.0).reshape(-1, 2).split(counts) if len(part)]
    of_ranks = 0.19 * torch.stack(means).mean(dim=0)
    assert ((first - of_ranks).abs().max() > 0.1) == (len(means) == 2), "the control has to be noticed"


# Distributions


MEANS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.4, 0.6], [0.2, 0.2, 0.6]])


@pytest.mark.parametrize("start", ["uniform", "batch"])
def test_a_moving_distribution_starts_uniform_or_with_the_first_batch(start):
    memory = MovingDistribution(3, momentum=0.9, start=start)
    expected = torch.full((3,), 1 / 3)
    assert_close(memory.value, expected)
    for number, mean in enumerate(MEANS):
        first = number == 0 and start == "batch"
        expected = mean if first else 0.9 * expected + 0.1 * mean
        memory.update(mean)
        assert_close(memory.value, expected)


def test_a_recent_distribution_is_the_mean_of_the_window():
    memory = RecentDistribution(3, window=3)
    seen = [torch.full((3,), 1 / 3)] * 3
    assert_close(memory.value, seen[0])
    for mean in MEANS:
        seen = [*seen[1:], mean]
        memory.update(mean)
        assert_close(memory.value, torch.stack(seen).mean(dim=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MovingDistribution(3, momentum=0.9),
        lambda: MovingDistribution(3, momentum=0.9, start="batch"),
        lambda: RecentDistribution(3, window=2),
    ],
)
def test_after_says_what_update_leaves_and_changes_nothing(make):
    memory, resumed = make(), make()
    for mean in MEANS:
        before = deepcopy(memory.state_dict())
        said = memory.after(mean)
        assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
        memory.update(mean)
        assert torch.equal(memory.value, said)
        resumed.load_state_dict(before)
        resumed.update(mean)
        assert torch.equal(resumed.value, said)


def test_nothing_makes_the_host_wait_for_the_device():
    queue, centre, moving = FeatureQueue(4, 2), Centre(3), MovingDistribution(3, momentum=0.9)
    features, total, rows = torch.ones(2, 2), torch.ones(3), torch.full((), 4)
    with cpu_refuses_to_wait():
        queue.enqueue(features)
        assert not queue.full
        centre.update(total, num_rows=rows, momentum=0.9)
        centre.update(total, num_rows=4, momentum=0.9)
        moving.update(total / 3)

"""The queue of features."""

import pytest
import torch

from ssl_pipeline.modules.memory import FeatureQueue


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

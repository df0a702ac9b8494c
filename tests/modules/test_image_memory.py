"""What is remembered of each image, against loops over the rows."""

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.config import ConfigError
from ssl_pipeline.modules.image_memory import ScoreBoard, TemporalEnsemble
from tests.methods.test_no_sync import cpu_refuses_to_wait


def thresholds_by_loop(labels, num_classes, threshold, warmup):
    counts = [labels.count(c) for c in range(num_classes)]
    largest = max([*counts, labels.count(-1)] if warmup else counts)
    shares = [count / largest if largest else 0.0 for count in counts]
    return [threshold * share / (2 - share) for share in shares]


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    "labels", [[-1] * 6, [0, 0, 0, 1, -1, -1], [2, -1, -1, -1, -1, -1], [0, 1, 2, 0, 1, 2], [1] * 6]
)
def test_thresholds_equal_the_loop(labels, warmup):
    board = ScoreBoard(6, 3, threshold=0.95, warmup=warmup)
    board.labels.copy_(torch.tensor(labels))
    assert_close(board.thresholds(), torch.tensor(thresholds_by_loop(labels, 3, 0.95, warmup)))


def test_at_first_every_guess_is_kept_and_the_best_learnt_class_is_held_to_the_threshold():
    board = ScoreBoard(4, 2, threshold=0.9)
    assert board.thresholds().tolist() == [0, 0]
    board.labels.copy_(torch.tensor([0, 0, 1, 0]))
    assert_close(board.thresholds(), torch.tensor([0.9, 0.9 * (1 / 3) / (2 - 1 / 3)]))


def test_a_guess_is_recorded_from_the_fixed_threshold_on():
    board = ScoreBoard(5, 3, threshold=0.5)
    board.record(torch.tensor([4, 0, 2]), torch.tensor([0.5, 0.49, 0.9]), torch.tensor([1, 1, 2]))
    assert board.labels.tolist() == [-1, -1, 2, -1, 1]
    board.record(torch.tensor([2, 4]), torch.tensor([0.4, 0.6]), torch.tensor([0, 0]))
    assert board.labels.tolist() == [-1, -1, 2, -1, 0]


def test_where_an_image_comes_twice_its_last_confident_guess_counts():
    board = ScoreBoard(3, 3, threshold=0.5)
    index, guesses = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([0, 2, 1, 1, 2])
    board.record(index, torch.tensor([0.9, 0.8, 0.1, 0.1, 0.2]), guesses)
    assert board.labels.tolist() == [-1, 2, -1]


def test_an_ensemble_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    ensemble = TemporalEnsemble(4, 3, momentum=0.6)
    sums, visits = torch.zeros(4, 3), [0] * 4
    for index in ([0, 2], [2, 3], [2, 0], [3, 2]):  # image 1 never, image 2 always
        probabilities = torch.rand(2, 3, generator=generator).softmax(dim=1)
        ensemble.update(torch.tensor(index), probabilities)
        for row, image in enumerate(index):
            sums[image] = 0.6 * sums[image] + 0.4 * probabilities[row]
            visits[image] += 1
        expected = [sums[i] / (1 - 0.6 ** visits[i]) if visits[i] else torch.zeros(3) for i in range(4)]
        assert_close(ensemble.targets(torch.arange(4)), torch.stack(expected))
    assert ensemble.visits.tolist() == visits


def test_the_first_target_is_the_first_prediction_and_stays_while_an_image_is_left_out():
    ensemble = TemporalEnsemble(2, 2, momentum=0.6)
    ensemble.update(torch.tensor([1]), torch.tensor([[0.25, 0.75]]))
    for _ in range(3):
        ensemble.update(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert_close(ensemble.targets(torch.tensor([1, 0])), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))


def test_where_an_image_comes_twice_its_last_row_counts_once():
    ensemble = TemporalEnsemble(2, 2, momentum=0.6)
    ensemble.update(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert_close(ensemble.targets(torch.tensor([1])), torch.tensor([[0.5, 0.5]]))
    assert ensemble.visits.tolist() == [0, 1]


def test_the_memory_survives_a_restart():
    ensemble, board = TemporalEnsemble(2, 2, momentum=0.6), ScoreBoard(2, 2, threshold=0.5)
    ensemble.update(torch.tensor([1]), torch.tensor([[0.25, 0.75]]))
    board.record(torch.tensor([1]), torch.tensor([0.9]), torch.tensor([1]))
    fresh, empty = TemporalEnsemble(2, 2, momentum=0.6), ScoreBoard(2, 2, threshold=0.5)
    fresh.load_state_dict(ensemble.state_dict())
    empty.load_state_dict(board.state_dict())
    assert torch.equal(fresh.targets(torch.arange(2)), ensemble.targets(torch.arange(2)))
    assert torch.equal(empty.thresholds(), board.thresholds())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: TemporalEnsemble(1_281_167, 1000, momentum=0.6),
            "TemporalEnsemble remembers every image: 4.8 GiB for 1,281,167 images, but 2 GiB are allowed. Use fewer "
            "images or classes, or a method that remembers no image.",
        ),
        (lambda: ScoreBoard(10**9, 10, threshold=0.9), "ScoreBoard remembers every image: 7.5 GiB for 1,000,000,000"),
    ],
)
def test_a_memory_that_is_too_large_is_refused_before_it_is_made(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(sentence)


def test_nothing_makes_the_host_wait_for_the_device():
    ensemble, board = TemporalEnsemble(3, 2, momentum=0.6), ScoreBoard(3, 2, threshold=0.5)
    index, values, guesses = torch.tensor([2, 0]), torch.ones(2), torch.tensor([1, 1])
    with cpu_refuses_to_wait():
        board.record(index, values, guesses)
        board.thresholds()
        ensemble.update(index, values[:, None].expand(2, 2))
        ensemble.targets(index)

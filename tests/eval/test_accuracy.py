import torch

from ssl_pipeline.eval.accuracy import top_k_accuracy, top_k_hits


def test_the_best_scored_class_counts_for_top1_and_the_five_best_for_top5() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4]])
    assert top_k_hits(scores, torch.tensor([0, 4, 5]), k=1).tolist() == [True, False, False]
    assert top_k_hits(scores, torch.tensor([0, 4, 5]), k=5).tolist() == [True, True, False]
    accuracy = top_k_accuracy(scores, torch.tensor([0, 4, 5]))
    torch.testing.assert_close(accuracy, {"top1": 100 / 3, "top5": 200 / 3})


def test_fewer_than_five_classes_make_top5_complete() -> None:
    scores = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert top_k_accuracy(scores, torch.tensor([0, 0])) == {"top1": 50.0, "top5": 100.0}


def test_equal_scores_rank_by_class_number() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert top_k_hits(scores, torch.tensor([0, 1]), k=1).tolist() == [True, False]


def test_scores_that_are_not_a_number_are_misses() -> None:
    scores = torch.tensor([[torch.nan, torch.nan], [torch.nan, 1.0]])
    assert top_k_accuracy(scores, torch.tensor([0, 1])) == {"top1": 0.0, "top5": 0.0}

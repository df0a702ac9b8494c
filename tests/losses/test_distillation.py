"""Self-distillation, BYOL's and SimSiam's loss against loops written from the formulas."""

import math

import pytest
import torch

from ssl_pipeline.losses import byol_loss, feature_loss, self_distillation, simsiam_loss


def random_crops(num_student, num_teacher, num_images=3, num_prototypes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(num_student, num_images, num_prototypes, generator=generator, dtype=dtype)
    teacher = torch.randn(num_teacher, num_images, num_prototypes, generator=generator, dtype=dtype).softmax(-1)
    return student.requires_grad_(), teacher


def self_distillation_by_loops(student, teacher, temperature, leave_out_same_crop=True):
    pairs = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t or not leave_out_same_crop:
                for b in range(student.shape[1]):
                    log_student = torch.log_softmax(student[s, b] / temperature, dim=0)
                    pairs.append(-(teacher[t, b] * log_student).sum())
    return torch.stack(pairs).mean()


@pytest.mark.parametrize(("num_student", "num_teacher"), [(2, 1), (2, 2), (3, 3), (10, 2)])
def test_self_distillation_and_its_gradient_equal_the_loop(num_student, num_teacher):
    student, teacher = random_crops(num_student, num_teacher)
    actual = self_distillation(student, teacher, temperature=0.1)
    expected = self_distillation_by_loops(student, teacher, 0.1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))


@pytest.mark.parametrize(("num_student", "num_teacher"), [(1, 1), (3, 2), (2, 3)])
def test_all_pairs_count_where_same_crops_are_not_left_out(num_student, num_teacher):
    student, teacher = random_crops(num_student, num_teacher)
    actual = self_distillation(student, teacher, temperature=0.1, leave_out_same_crop=False)
    expected = self_distillation_by_loops(student, teacher, 0.1, leave_out_same_crop=False)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))


def test_self_distillation_of_equal_crops_is_the_entropy():
    logits = torch.tensor([0.0, math.log(3)]).expand(4, 6, 2)
    probabilities = torch.tensor([0.25, 0.75]).expand(2, 6, 2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(self_distillation(logits, probabilities, temperature=1.0), torch.tensor(entropy))


def test_same_crop_pairs_are_left_out():
    student, teacher = random_crops(2, 1)
    loss = self_distillation(student, teacher, temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0].abs().max() == 0  # the only teacher crop is student crop 0
    assert gradient[1].abs().max() > 0


def test_the_teacher_receives_no_gradient():
    student, teacher = random_crops(3, 2)
    teacher = teacher.clone().requires_grad_()
    self_distillation(student, teacher, temperature=0.1).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), "at least 2 student crops"),
        (torch.ones(2, 2, 3), torch.ones(3, 2, 3), "Got 2 and 3"),
        (torch.ones(2, 2, 3), torch.ones(0, 2, 3), "Got 2 and 0"),
        (torch.ones(2, 2, 3), torch.ones(2, 2, 4), r"\(T, B, K\)"),
    ],
)
def test_crops_without_a_pair_are_refused(student, teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        self_distillation(student, teacher, temperature=0.1)


def test_no_crop_and_no_temperature_are_refused():
    student, teacher = random_crops(2, 1)
    with pytest.raises(ValueError, match=r"a crop of each\. Got 2 and 0"):
        self_distillation(student, teacher[:0], temperature=0.1, leave_out_same_crop=False)
    with pytest.raises(ValueError, match=r"temperature above 0\. Got 0"):
        self_distillation(student, teacher, temperature=0)


def random_pairs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def test_byol_loss_equals_the_loop_and_trains_the_predictions_only():
    p1, p2, z1, z2 = random_pairs()
    rows = [4 - 2 * cosine(p1[i], z2[i].detach()) - 2 * cosine(p2[i], z1[i].detach()) for i in range(len(p1))]
    expected = torch.stack(rows).mean()
    loss = byol_loss(p1, p2, z1, z2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close([p1.grad, p2.grad], list(torch.autograd.grad(expected, (p1, p2))))
    assert z1.grad is None
    assert z2.grad is None


def test_simsiam_loss_equals_the_loop_and_trains_the_predictions_only():
    p1, p2, z1, z2 = random_pairs()
    rows = [-(cosine(p1[i], z2[i].detach()) + cosine(p2[i], z1[i].detach())) / 2 for i in range(len(p1))]
    expected = torch.stack(rows).mean()
    loss = simsiam_loss(p1, p2, z1, z2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close([p1.grad, p2.grad], list(torch.autograd.grad(expected, (p1, p2))))
    assert z1.grad is None
    assert z2.grad is None


def test_perfect_predictions_reach_the_minimum():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(byol_loss(a, b, b, a), torch.tensor(0.0))
    torch.testing.assert_close(simsiam_loss(a, b, b, a), torch.tensor(-1.0))


def test_predictions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"Got \(4, 3\) and \(4, 2\)"):
        byol_loss(torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 2))


# features of a frozen teacher


def features():
    generator = torch.Generator().manual_seed(3)
    student = (2 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    return student, torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("distance", ["cosine", "mse", "smooth_l1"])
def test_feature_loss_and_its_gradient_equal_the_loop(distance):
    student, teacher = features()
    terms = []
    for s, t in zip(student.flatten(0, 1), teacher.detach().flatten(0, 1), strict=True):
        if distance == "cosine":
            terms.append(1 - (s * t).sum() / (s.square().sum().sqrt() * t.square().sum().sqrt()))
            continue
        for gap in s - t:
            small = gap.square() / 2 if abs(gap) < 1 else abs(gap) - 0.5
            terms.append(gap.square() if distance == "mse" else small)
    expected = torch.stack(terms).mean()
    loss = feature_loss(student, teacher, distance=distance)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


def test_the_teachers_features_get_no_gradient():
    student, teacher = features()
    feature_loss(student, teacher, distance="mse").backward()
    assert teacher.grad is None


def test_features_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"of one shape\. Got \(2, 3\) and \(2, 4\)"):
        feature_loss(torch.ones(2, 3), torch.ones(2, 4), distance="cosine")

"""How iBOT, DINOv2, DINOv3 and SwAV use the loss in slabs, each against a loop over whole logits."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssl_pipeline.distributed import mean_over_ranks, rank, world_size
from ssl_pipeline.losses import (
    PrototypeTargets,
    centred_softmax,
    centred_targets,
    crop_pairs,
    prototype_cross_entropy,
    prototype_targets,
    prototypes,
    prototypes_used,
    sinkhorn_knopp,
    sinkhorn_targets,
)
from tests.methods.test_no_sync import cpu_refuses_to_wait
from tests.ranks import run_on_ranks

K, D = 11, 5
STUDENT, TEACHER = 0.1, 0.05


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    monkeypatch.setattr(prototypes, "SLAB", 4)
    monkeypatch.setattr(prototype_targets, "SLAB", 3)


def rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def student_rows(*shape):
    """Rows and the prototypes that are trained."""
    return rows(*shape, D, seed=0).requires_grad_(), rows(K, D, seed=1).requires_grad_()


def teacher_rows(*shape):
    """Rows, prototypes and a centre."""
    return rows(*shape, D, seed=2), rows(K, D, seed=3), 0.3 * rows(K, seed=4)


def cross_entropy(target_K, row_D, prototypes_KD, temperature=STUDENT):
    return -(target_K * torch.log_softmax(prototypes_KD @ row_D / temperature, dim=0)).sum()


def assert_same(actual, expected, inputs):
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (actual, expected)]
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


def entropy(targets_MK):
    return -torch.special.xlogy(targets_MK, targets_MK).sum(dim=1).mean()


MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)  # patches of 3 image crops


def patch_weights(mask_NL):
    """What each masked patch counts in iBOT and DINOv2: images alike, and the patches of an image alike."""
    per_image = 1 / mask_NL.double().sum(dim=1, keepdim=True).clamp(min=1) / len(mask_NL)
    return per_image.expand_as(mask_NL)[mask_NL]


def test_ibot_predicts_masked_patches_of_the_same_crop():
    (student, weights), (teacher, teacher_weights, centre) = student_rows(3, 4), teacher_rows(3, 4)
    targets = centred_targets(teacher[MASK], teacher_weights, centre, temperature=TEACHER)
    actual, found_entropy = prototype_cross_entropy(
        student[MASK], weights, targets, patch_weights(MASK), temperature=STUDENT
    )
    expected, whole_targets = [], []
    for n in range(3):
        patches = []
        for patch in MASK[n].nonzero().flatten():
            target = centred_softmax(teacher_weights @ teacher[n, patch], centre, temperature=TEACHER)
            patches.append(cross_entropy(target, student[n, patch], weights))
            whole_targets.append(target)
        expected.append(torch.stack(patches).mean() if patches else 0 * student.sum())
    assert_same(actual, torch.stack(expected).mean(), (student, weights))
    assert_close(found_entropy, entropy(torch.stack(whole_targets)))


def test_nothing_masked_is_zero_and_still_differentiable():
    student, weights = student_rows(0)
    teacher, teacher_weights, centre = teacher_rows(0)
    targets = centred_targets(teacher, teacher_weights, centre, temperature=TEACHER)
    loss, found_entropy = prototype_cross_entropy(student, weights, targets, student.new_ones(0), temperature=STUDENT)
    loss.backward()
    assert loss == 0
    assert found_entropy == 0
    assert not weights.grad.any()


@pytest.mark.parametrize("leave_out_same_crop", [True, False])
@pytest.mark.parametrize("num_iterations", [0, 3])
def test_dinov2_and_dinov3_balance_all_teacher_crops_at_once(num_iterations, leave_out_same_crop):
    """By centring without iterations; DINOv3 leaves same crops out by a switch."""
    (student, weights), (teacher, teacher_weights, centre) = student_rows(5, 3), teacher_rows(2, 3)
    flat, logits_MK = teacher.flatten(0, 1), teacher.flatten(0, 1) @ teacher_weights.T
    if num_iterations:
        settings = {"epsilon": TEACHER, "num_iterations": num_iterations}
        targets, codes = sinkhorn_targets(flat, teacher_weights, **settings), sinkhorn_knopp(logits_MK, **settings)
    else:
        targets = centred_targets(flat, teacher_weights, centre, temperature=TEACHER)
        codes = centred_softmax(logits_MK, centre, temperature=TEACHER)
    weights_N, mix_ST = crop_pairs(student.flatten(0, 1), flat, num_images=3, leave_out_same_crop=leave_out_same_crop)
    actual, found_entropy = prototype_cross_entropy(
        student.flatten(0, 1), weights, targets, weights_N, temperature=STUDENT, mix_ST=mix_ST
    )
    pairs = []
    for s in range(5):
        for t in range(2):
            if s != t or not leave_out_same_crop:
                pairs += [cross_entropy(codes.view(2, 3, K)[t, b], student[s, b], weights) for b in range(3)]
    assert_same(actual, torch.stack(pairs).mean(), (student, weights))
    assert_close(found_entropy, entropy(codes))


@pytest.mark.parametrize("size_of_queue", [0, 7])
def test_swav_balances_each_assigned_crop_on_its_own_with_its_queue(size_of_queue):
    num_crops, num_assigned, num_images = 4, 2, 3
    student, weights = student_rows(num_crops, num_images)
    queues = rows(num_assigned, size_of_queue, D, seed=5)
    targets = sinkhorn_targets(
        student[:num_assigned].flatten(0, 1), weights, epsilon=TEACHER, num_iterations=3, num_parts=num_assigned,
        queues_AQD=queues if size_of_queue else None,
    )  # fmt: skip
    weights_N, mix_ST = crop_pairs(student.flatten(0, 1), student[:num_assigned].flatten(0, 1), num_images=num_images)
    actual, _ = prototype_cross_entropy(
        student.flatten(0, 1), weights, targets, weights_N, temperature=STUDENT, mix_ST=mix_ST
    )
    pairs = []
    for a in range(num_assigned):
        scores = torch.cat([queues[a], student[a].detach()]) @ weights.detach().T
        codes = sinkhorn_knopp(scores, epsilon=TEACHER, num_iterations=3)[size_of_queue:]
        for v in range(num_crops):
            if v != a:
                pairs += [cross_entropy(codes[b], student[v, b], weights) for b in range(num_images)]
    assert_same(actual, torch.stack(pairs).mean(), (student, weights))


def test_targets_that_are_there_give_what_computed_ones_give():
    (student, weights), (teacher, teacher_weights, centre) = student_rows(5, 3), teacher_rows(2, 3)
    computed = centred_targets(teacher.flatten(0, 1), teacher_weights, centre, temperature=TEACHER)
    given = centred_softmax(teacher.flatten(0, 1) @ teacher_weights.T, centre, temperature=TEACHER)
    weights_N, mix_ST = crop_pairs(student.flatten(0, 1), teacher.flatten(0, 1), num_images=3)
    found = [
        prototype_cross_entropy(student.flatten(0, 1), weights, targets, weights_N, temperature=STUDENT, mix_ST=mix_ST)
        for targets in (given.requires_grad_(), computed)
    ]
    assert_same(found[0][0], found[1][0], (student, weights))
    assert_close(found[0][1], found[1][1])
    assert not found[0][1].requires_grad


def test_one_hot_targets_are_classes():
    student, weights = student_rows(4)
    classes = torch.tensor([3, 0, 10, 3])
    actual, found_entropy = prototype_cross_entropy(
        student, weights, F.one_hot(classes, K).double(), student.new_full((4,), 1 / 4), temperature=STUDENT
    )
    assert_same(actual, F.cross_entropy(student @ weights.T / STUDENT, classes), (student, weights))
    assert found_entropy == 0


def test_a_row_of_weight_zero_counts_for_nothing():
    """As a place that is kept for a masked patch and not filled."""
    student, weights = student_rows(3)
    targets = PrototypeTargets(*teacher_rows(3)[:2], torch.zeros(1, K, dtype=torch.float64), TEACHER)
    loss, _ = prototype_cross_entropy(student, weights, targets, torch.tensor([0.5, 0.0, 0.5]), temperature=STUDENT)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights_N": torch.ones(5)}, r"weights \(5,\)"),
        ({"targets": torch.ones(6, K - 1)}, r"targets \(6, 10\)"),
        ({"targets": torch.ones(5, K)}, r"targets \(5, 11\)"),
        ({"mix_ST": torch.ones(4, 4)}, r"rows \(6, 5\).*mix \(4, 4\)"),
        ({"mix_ST": torch.ones(3, 2)}, r"mix \(3, 2\)"),
        ({"mix_ST": torch.ones(0, 1)}, r"mix \(0, 1\)"),
        ({"mix_ST": torch.ones(1)}, r"mix \(1,\)"),
        ({"weights_N": torch.ones(6, 1)}, r"weights \(6, 1\)"),
        ({"targets": torch.ones(6)}, r"targets \(6,\)"),
        ({"prototypes_KD": torch.ones(K, D + 1)}, r"prototypes \(11, 6\)"),
        ({"prototypes_KD": torch.ones(0, D), "targets": torch.ones(6, 0)}, r"prototypes \(0, 5\)"),
        ({"temperature": 0.0}, "temperature above 0. Got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    student, weights = student_rows(6)
    arguments = {
        "prototypes_KD": weights, "targets": torch.ones(6, K), "weights_N": torch.ones(6), "temperature": STUDENT
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        prototype_cross_entropy(student, **arguments)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epsilon": 0.0}, "epsilon above 0"),
        ({"num_parts": 4}, "num_parts=4 equal parts.*Got 6 rows and no queues"),
        ({"num_parts": 2, "queues_AQD": torch.ones(3, 1, D)}, "Got 6 rows and 3 queues"),
    ],
)
def test_targets_that_cannot_be_balanced_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        sinkhorn_targets(rows(6, D, seed=0), rows(K, D, seed=1), **{"epsilon": 0.05, "num_iterations": 3} | settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_codes_are_balanced_for_the_logits_that_are_used(dtype):
    """Shifts found for products of another precision would not balance these."""
    teacher, teacher_weights, _ = teacher_rows(8)
    teacher, teacher_weights = teacher.float(), teacher_weights.float()
    with torch.autocast("cpu", dtype):
        targets = sinkhorn_targets(teacher, teacher_weights, epsilon=TEACHER, num_iterations=3)
        codes = sinkhorn_knopp(F.linear(teacher, teacher_weights), epsilon=TEACHER, num_iterations=3)
        logits = F.linear(teacher, teacher_weights).float() / TEACHER + targets.shifts
    assert targets.shifts.dtype == torch.float32
    assert_close(logits.softmax(dim=1), codes, rtol=1e-5, atol=1e-6)


def test_nothing_makes_the_host_wait_for_the_device():
    (student, weights), (teacher, teacher_weights, _) = student_rows(6), teacher_rows(6)
    with cpu_refuses_to_wait():
        targets = sinkhorn_targets(teacher, teacher_weights, epsilon=TEACHER, num_iterations=3, num_parts=2)
        weights_N, mix_ST = crop_pairs(student, teacher, num_images=3)
        prototype_cross_entropy(student, weights, targets, weights_N, temperature=STUDENT, mix_ST=mix_ST)[0].backward()


def masked_patches_of_a_share(counts):
    """Mean over processes of loss and gradients; each process has its own number of masked patches."""
    total = sum(counts)
    (student, weights), (teacher, teacher_weights, _) = student_rows(total), teacher_rows(total)
    first = sum(counts[: rank()])
    here = slice(first, first + counts[rank()]) if world_size() > 1 else slice(0, total)
    targets = sinkhorn_targets(teacher[here], teacher_weights, epsilon=TEACHER, num_iterations=3)
    weights_N = torch.full((len(student[here]),), world_size() / total)
    loss, _ = prototype_cross_entropy(student[here], weights, targets, weights_N, temperature=STUDENT)
    loss.backward()
    return [mean_over_ranks(value) for value in (loss, student.grad, weights.grad)]


@pytest.mark.parametrize("counts", [(2, 5), (7, 0)])
def test_sinkhorn_targets_of_two_processes_are_those_of_one(counts):
    expected = masked_patches_of_a_share(counts)
    first, second = run_on_ranks(masked_patches_of_a_share, counts)
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, expected, rtol=1e-9, atol=1e-12)
    if all(counts):
        alone = run_on_ranks(without_gathering, counts)
        assert (alone[0][0] - expected[0]).abs() > 1e-3, "the control has to be noticed"


def without_gathering(counts):
    with mock.patch("ssl_pipeline.losses.assignment.logsumexp_over_ranks", lambda local: local):
        return masked_patches_of_a_share(counts)


def test_prototypes_used_counts_the_likeliest_of_each_row():
    prototypes_KD = torch.eye(5, dtype=torch.float64)
    centre_K = torch.zeros(5, dtype=torch.float64)
    rows_MD = torch.stack([prototypes_KD[k] for k in (4, 0, 4, 3)])
    targets = centred_targets(rows_MD, prototypes_KD, centre_K, temperature=TEACHER)
    assert prototypes_used(targets).item() == 3 / 4
    same = centred_targets(prototypes_KD[[2] * 10], prototypes_KD, centre_K, temperature=TEACHER)
    assert prototypes_used(same).item() == pytest.approx(1 / 5), "of 5 prototypes at most 5 can be used"
    centred = centred_targets(rows_MD, prototypes_KD, 2 * prototypes_KD[4], temperature=TEACHER)
    assert prototypes_used(centred).item() == pytest.approx(2 / 4), (
        "the centre takes the fifth away; a tie is the first"
    )


def test_prototypes_used_is_that_of_whole_logits():
    rows_MD, prototypes_KD, _ = teacher_rows(12)
    targets = sinkhorn_targets(rows_MD, prototypes_KD, epsilon=TEACHER, num_iterations=3, num_parts=2)
    likeliest = targets.logits(slice(0, K))[:6].argmax(dim=1).tolist()
    assert prototypes_used(targets).item() == pytest.approx(len(set(likeliest)) / 6)

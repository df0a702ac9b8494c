"""The loss in slabs of prototypes against that of whole logits, as DINO uses it."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pipeline.losses import (
    centred_softmax,
    centred_targets,
    crop_pairs,
    prototype_cross_entropy,
    prototypes,
    self_distillation,
    total_logits,
)
from ssl_pipeline.modules.heads import PrototypeHead

TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.04}


def rows(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def bottlenecks(num_student=5, num_teacher=2, num_images=3, num_prototypes=23, dtype=torch.float64):
    """Student and teacher crops, their prototypes and a centre, in the order of `distillation`."""
    return (
        rows(num_student, num_images, 6, seed=0, dtype=dtype).requires_grad_(),
        rows(num_prototypes, 6, seed=1, dtype=dtype).requires_grad_(),
        rows(num_teacher, num_images, 6, seed=2, dtype=dtype),
        rows(num_prototypes, 6, seed=3, dtype=dtype),
        rows(num_prototypes, seed=4, dtype=dtype),
    )


def distillation(student, weights, teacher, teacher_weights, centre, *, temperature, teacher_temperature):
    """DINO's loss from the bottlenecks on."""
    student_ND, teacher_MD = student.flatten(0, 1), teacher.flatten(0, 1)
    targets = centred_targets(teacher_MD, teacher_weights, centre, temperature=teacher_temperature)
    weights_N, mix_ST = crop_pairs(student_ND, teacher_MD, num_images=student.shape[1])
    return prototype_cross_entropy(student_ND, weights, targets, weights_N, temperature=temperature, mix_ST=mix_ST)


def whole(student, weights, teacher, teacher_weights, centre, *, temperature, teacher_temperature):
    """The public functions on whole logits."""
    probabilities = centred_softmax(F.linear(teacher, teacher_weights), centre, temperature=teacher_temperature)
    loss = self_distillation(F.linear(student, weights), probabilities, temperature=temperature)
    return loss, -torch.special.xlogy(probabilities, probabilities).sum(dim=-1).mean()


def gradients(loss, inputs):
    return torch.autograd.grad(3 * loss, inputs[:2])


@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize("slab", [1, 7, 23, 8192])
@pytest.mark.parametrize(("num_student", "num_teacher"), [(2, 1), (2, 2), (3, 3), (10, 2)])
def test_slabs_change_neither_loss_nor_entropy_nor_gradients(monkeypatch, kept, slab, num_student, num_teacher):
    monkeypatch.setattr(prototypes, "SLAB", slab)
    monkeypatch.setattr(prototypes, "CPU_KEPT", kept)
    inputs = bottlenecks(num_student, num_teacher)
    actual, expected = distillation(*inputs, **TEMPERATURES), whole(*inputs, **TEMPERATURES)
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert_close(gradients(actual[0], inputs), gradients(expected[0], inputs), rtol=1e-10, atol=1e-12)


def test_float32_is_exact_to_a_millionth(monkeypatch):
    monkeypatch.setattr(prototypes, "SLAB", 3000)
    inputs = bottlenecks(10, 2, num_images=2, num_prototypes=20_000, dtype=torch.float32)
    exact = tuple(rows.detach().double().requires_grad_(rows.requires_grad) for rows in inputs)
    actual, expected = distillation(*inputs, **TEMPERATURES), whole(*exact, **TEMPERATURES)
    assert_close([value.double() for value in actual], list(expected), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(actual[0], inputs), gradients(expected[0], exact), strict=True):
        assert (ours - theirs).norm() < 2e-6 * theirs.norm()


@pytest.mark.parametrize("fixed_scale", [True, False])
def test_the_parameters_of_a_head_get_the_gradient_of_its_logits(monkeypatch, fixed_scale):
    monkeypatch.setattr(prototypes, "SLAB", 4)
    torch.manual_seed(0)
    student, teacher = (
        PrototypeHead(6, 10, hidden_dim=8, bottleneck_dim=4, fixed_scale=fixed_scale).double() for _ in range(2)
    )
    features, teacher_features, centre = rows(4, 3, 6, seed=0), rows(2, 3, 6, seed=1), rows(10, seed=2)
    actual, _ = distillation(
        student.bottleneck(features), student.prototypes(),
        teacher.bottleneck(teacher_features), teacher.prototypes(), centre, **TEMPERATURES,
    )  # fmt: skip
    probabilities = centred_softmax(teacher(teacher_features), centre, temperature=0.04)
    expected = self_distillation(student(features), probabilities, temperature=0.1)
    assert_close(actual, expected)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert_close(torch.autograd.grad(actual, trained), torch.autograd.grad(expected, trained))


def test_the_gradients_pass_gradcheck(monkeypatch):
    monkeypatch.setattr(prototypes, "SLAB", 3)
    student, weights, *teacher = bottlenecks(3, 2, num_images=2, num_prototypes=5)
    assert torch.autograd.gradcheck(
        lambda a, b: distillation(a, b, *teacher, temperature=0.5, teacher_temperature=0.3)[0],
        (student, weights),
    )


def test_only_the_student_receives_a_gradient():
    student, weights, *others = bottlenecks()
    others = [tensor.clone().requires_grad_() for tensor in others]
    loss, entropy = distillation(student, weights, *others, **TEMPERATURES)
    loss.backward()
    assert student.grad is not None
    assert weights.grad is not None
    assert all(tensor.grad is None for tensor in others)
    assert not entropy.requires_grad


def test_the_total_logits_are_those_of_the_rows():
    _, _, teacher, weights, _ = bottlenecks()
    assert_close(total_logits(teacher, weights), F.linear(teacher, weights).sum(dim=(0, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert total_logits(teacher.bfloat16(), weights.float()).dtype == torch.float32


def test_many_rows_make_slabs_narrower(monkeypatch):
    monkeypatch.setattr(prototypes, "CPU_LOGITS", 60)
    inputs = bottlenecks(5, 2)
    with Sizes() as sizes:
        actual = distillation(*inputs, **TEMPERATURES)
    assert sizes.largest == 23 * 6  # the prototypes; logits are 15 rows by 4
    assert_close(actual, whole(*inputs, **TEMPERATURES))


def test_a_loss_of_few_logits_keeps_them_for_backward_and_no_other(monkeypatch):
    num_logits = (5 + 2) * 3 * 23
    inputs = bottlenecks(5, 2)
    for limit, kept in ((num_logits, num_logits), (num_logits - 1, 0)):
        monkeypatch.setattr(prototypes, "CPU_KEPT", limit)
        loss, _ = distillation(*inputs, **TEMPERATURES)
        assert sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors if tensor.shape[-1:] == (23,)) == kept
    monkeypatch.setattr(prototypes, "CPU_KEPT", num_logits)
    loss, _ = distillation(*inputs, **TEMPERATURES)
    function = loss.grad_fn
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        function.saved_tensors  # noqa: B018


def test_large_logits_stay_finite():
    student, weights, teacher, teacher_weights, centre = (value.float() for value in bottlenecks())
    inputs = (student, 1000 * weights, teacher, 1000 * teacher_weights, centre)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss, entropy = distillation(*leaves, **TEMPERATURES)
    assert_close(loss, whole(*leaves, **TEMPERATURES)[0])
    assert entropy.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(loss, leaves))


class Sizes(TorchDispatchMode):
    """Records the number of elements of the largest tensor, and the dtypes of the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        if function is torch.ops.aten.mm.default or function is torch.ops.aten.mm.out:
            self.products.add(tensors[0].dtype)
        return result


def test_no_tensor_grows_with_crops_times_prototypes(monkeypatch):
    monkeypatch.setattr(prototypes, "SLAB", 64)
    inputs = bottlenecks(10, 2, num_images=8, num_prototypes=1024)
    with Sizes() as sizes:
        loss, _ = distillation(*inputs, **TEMPERATURES)
        loss.backward()
    assert sizes.largest == max(10 * 8 * 64, 1024 * 6)  # logits of a slab, or the prototypes
    with Sizes() as sizes:
        whole(*inputs, **TEMPERATURES)
    assert sizes.largest == 10 * 8 * 1024, "the control has to be noticed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_only_the_products_are_in_half_precision(dtype):
    inputs = bottlenecks(dtype=torch.float32)
    with torch.autocast("cpu", dtype), Sizes() as sizes:
        actual = distillation(*inputs, **TEMPERATURES)
        found = gradients(actual[0], inputs)
    assert sizes.products == {dtype}
    assert {tensor.dtype for tensor in (*actual, *found)} == {torch.float32}
    with torch.autocast("cpu", dtype):
        expected = whole(*inputs, **TEMPERATURES)
    exact = whole(*inputs, **TEMPERATURES)
    assert_close(actual, expected, rtol=5e-6, atol=5e-6)  # the same logits, summed in the same precision
    for ours, theirs in zip(found, gradients(exact[0], inputs), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(("num_student", "num_teacher", "sentence"), [(1, 1, "at least 2"), (2, 3, "Got 2 and 3")])
def test_crops_without_a_pair_are_refused(num_student, num_teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        distillation(*bottlenecks(num_student, num_teacher), **TEMPERATURES)


def test_rows_of_no_whole_crops_are_refused():
    with pytest.raises(ValueError, match=r"num_images=3 images\. Got 6 and 4"):
        crop_pairs(torch.ones(6, 2), torch.ones(4, 2), num_images=3)

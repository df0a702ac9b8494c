"""NT-Xent, InfoNCE, MoCo v3's and NNCLR's loss against loops written from the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pipeline.losses import contrastive, info_nce, moco_v3_loss, nnclr_loss, nt_xent


def random_pairs(*shape, count=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(count)]


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def nt_xent_by_loops(z1, z2, temperature):
    rows = [*z1, *z2]
    total = 0.0
    for i, anchor in enumerate(rows):
        positive = (i + len(z1)) % len(rows)
        others = [torch.exp(cosine(anchor, other) / temperature) for j, other in enumerate(rows) if j != i]
        total = total - torch.log(torch.exp(cosine(anchor, rows[positive]) / temperature) / sum(others))
    return total / len(rows)


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_nt_xent_and_its_gradient_equal_the_loop(num_images):
    z1, z2 = random_pairs(num_images, 4)
    expected = nt_xent_by_loops(z1, z2, 0.3)
    actual = nt_xent(z1, z2, temperature=0.3)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(3 * actual, (z1, z2))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (z1, z2)))


@pytest.mark.parametrize("chunk", [1, 12, 35])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch, chunk):
    z1, z2 = random_pairs(6, 3)
    whole = nt_xent(z1, z2, temperature=0.1)
    gradients = torch.autograd.grad(whole, (z1, z2))
    monkeypatch.setattr(contrastive, "CPU_CHUNK", chunk)
    chunked = nt_xent(z1, z2, temperature=0.1)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, (z1, z2)), gradients)


def test_nt_xent_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.5), random_pairs(3, 4))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("num_images", [64, 256])
def test_nt_xent_takes_memory_in_proportion_to_the_rows(monkeypatch, num_images):
    monkeypatch.setattr(contrastive, "CPU_CHUNK", 1024)
    z1, z2 = random_pairs(num_images, 8)
    with Largest() as largest:
        nt_xent(z1, z2, temperature=0.1).backward()
    assert largest.elements == 2 * num_images * 8  # the rows; the logits would be (2 * num_images) ** 2


def test_nt_xent_of_identical_vectors_is_the_log_of_the_number_of_others():
    same = torch.ones(7, 3)
    torch.testing.assert_close(nt_xent(same, same, temperature=0.1), torch.tensor(math.log(2 * 7 - 1)))


def test_nt_xent_of_one_image_is_zero():
    z1, z2 = random_pairs(1, 4)
    loss = nt_xent(z1, z2, temperature=0.1)
    assert loss.item() == 0
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, (z1, z2)))


def test_nt_xent_does_not_depend_on_the_lengths_of_the_inputs():
    z1, z2 = random_pairs(4, 3)
    torch.testing.assert_close(nt_xent(7 * z1, z2 / 5, temperature=0.2), nt_xent(z1, z2, temperature=0.2))


def test_nt_xent_stays_finite_at_a_tiny_temperature():
    z1, z2 = random_pairs(4, 3, dtype=torch.float32)
    loss = nt_xent(z1, z2, temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert z1.grad.isfinite().all()


@pytest.mark.other
def test_nt_xent_compiles_without_a_graph_break():
    z1, z2 = random_pairs(3, 4)
    compiled = torch.compile(lambda a, b: nt_xent(a, b, temperature=0.3), fullgraph=True, backend="aot_eager")
    loss = compiled(z1, z2)
    torch.testing.assert_close(loss, nt_xent(z1, z2, temperature=0.3))
    assert torch.autograd.grad(loss, z1)[0].abs().sum() > 0


def info_nce_by_loops(queries, keys, negatives, temperature):
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        logits = torch.stack([cosine(query, other) / temperature for other in [key, *negatives]])
        total = total - torch.log(logits.exp()[0] / logits.exp().sum())
    return total / len(queries)


def test_info_nce_equals_the_loop_and_trains_the_queries_only():
    queries, keys = random_pairs(4, 5)
    (negatives,) = random_pairs(6, 5, count=1, seed=1)
    loss = info_nce(queries, keys, negatives, temperature=0.2)
    expected = info_nce_by_loops(queries, keys.detach(), negatives.detach(), 0.2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(queries.grad, torch.autograd.grad(expected, queries)[0])
    assert keys.grad is None
    assert negatives.grad is None


def test_info_nce_of_a_negative_equal_to_the_key_is_log_two():
    queries = torch.tensor([[3.0, 0.0]])
    loss = info_nce(queries, queries, torch.tensor([[0.5, 0.0]]), temperature=0.07)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))


def test_moco_v3_loss_equals_the_loop_and_trains_the_queries_only():
    q1, q2, k1, k2 = random_pairs(4, 5, count=4)
    temperature = 0.2
    expected = 0.0
    for queries, keys in ((q1, k2.detach()), (q2, k1.detach())):
        for i, query in enumerate(queries):
            logits = torch.stack([cosine(query, key) / temperature for key in keys])
            expected = expected - torch.log(logits.exp()[i] / logits.exp().sum()) / len(queries) * 2 * temperature
    loss = moco_v3_loss(q1, q2, k1, k2, temperature=temperature)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close([q1.grad, q2.grad], list(torch.autograd.grad(expected, (q1, q2))))
    assert k1.grad is None
    assert k2.grad is None


def test_keys_are_found_among_the_keys_of_all_processes(monkeypatch):
    # two processes of which this is the second: its own rows come after the other's
    q1, q2, k1, k2 = [tensor.detach() for tensor in random_pairs(3, 4, count=4)]
    others = F.normalize(random_pairs(3, 4, count=1, seed=5)[0].detach(), dim=1)
    monkeypatch.setattr(contrastive, "rank", lambda: 1)
    monkeypatch.setattr(contrastive, "gather", lambda own: torch.cat([others, own]))
    expected = 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        all_keys = torch.cat([others, F.normalize(keys, dim=1)])
        logits = F.normalize(queries, dim=1) @ all_keys.T / 0.5
        expected = expected + F.cross_entropy(logits, torch.tensor([3, 4, 5]))
    torch.testing.assert_close(moco_v3_loss(q1, q2, k1, k2, temperature=0.5), expected)


def test_anchors_of_the_second_process_meet_the_rows_of_both(monkeypatch):
    z1, z2, y1, y2 = [tensor.detach() for tensor in random_pairs(3, 4, count=4)]
    others = F.normalize(torch.cat([y1, y2]), dim=1)
    monkeypatch.setattr(contrastive, "rank", lambda: 1)
    monkeypatch.setattr(contrastive, "gather_with_grad", lambda own: torch.cat([others, own]))
    second = nt_xent(z1, z2, temperature=0.5)
    own = F.normalize(torch.cat([z1, z2]), dim=1)
    monkeypatch.setattr(contrastive, "rank", lambda: 0)
    monkeypatch.setattr(contrastive, "gather_with_grad", lambda first: torch.cat([first, own]))
    first = nt_xent(y1, y2, temperature=0.5)
    monkeypatch.setattr(contrastive, "gather_with_grad", lambda rows: rows)
    together = nt_xent(torch.cat([y1, z1]), torch.cat([y2, z2]), temperature=0.5)
    torch.testing.assert_close((first + second) / 2, together)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: nt_xent(torch.ones(4, 8), torch.ones(5, 8), temperature=1), r"Got \(4, 8\), \(5, 8\)"),
        (lambda: nt_xent(torch.ones(0, 8), torch.ones(0, 8), temperature=1), "N >= 1"),
        (lambda: info_nce(torch.ones(4, 8), torch.ones(4, 7), torch.ones(3, 8), temperature=1), "queries, keys"),
        (lambda: info_nce(torch.ones(4, 8), torch.ones(4, 8), torch.ones(8, 3), temperature=1), r"\(K, 8\)"),
        (lambda: moco_v3_loss(*[torch.ones(4, 8)] * 3, torch.ones(8), temperature=1), "moco_v3_loss needs"),
    ],
)
def test_wrong_shapes_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def nnclr_by_loops(p1, p2, z1, z2, support, temperature):
    total = 0.0
    for p, z in ((p2, z1), (p1, z2)):
        for i in range(len(z)):
            nearest = max(support, key=lambda row, z_i=z[i]: cosine(row, z_i).item())
            terms = [torch.exp(cosine(nearest, prediction) / temperature) for prediction in p]
            total = total - torch.log(terms[i] / sum(terms)) / len(z) / 2
    return total


@pytest.mark.parametrize(("num_images", "queue_size"), [(5, 7), (2, 1), (1, 3)])
def test_nnclr_and_its_gradient_equal_the_loop(num_images, queue_size):
    p1, p2, z1, z2 = random_pairs(num_images, 4, count=4)
    (support,) = random_pairs(queue_size, 4, count=1, seed=1)
    expected = nnclr_by_loops(p1, p2, z1, z2, support, 0.3)
    actual = nnclr_loss(p1, p2, z1, z2, support, temperature=0.3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (p1, p2)), torch.autograd.grad(expected, (p1, p2)))


def test_nnclr_gives_a_gradient_to_predictions_alone():
    inputs = random_pairs(4, 3, count=5)
    nnclr_loss(*inputs, temperature=0.3).backward()
    assert [value.grad is not None for value in inputs] == [True, True, False, False, False]


def test_nnclr_by_hand():
    x, y = torch.eye(2, dtype=torch.float64)
    z, support = torch.stack([2 * x, 3 * y]), torch.stack([x + 0.1 * y, 5 * y, -x])  # lengths do not count
    p = torch.stack([x, y])
    # the neighbour of the first image is x + 0.1 y, of the second y
    first = math.log(1 + math.exp((0.1 - 1) / 1.01**0.5 / 0.5))
    second = math.log(1 + math.exp((0 - 1) / 0.5))
    assert nnclr_loss(p, p, z, z, support, temperature=0.5).item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("support", [torch.ones(3, 4), torch.ones(0, 3), torch.ones(3)])
def test_nnclr_refuses_a_support_that_does_not_fit(support):
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^nnclr_loss needs a support of shape \(Q, 3\) like the projections"):
        nnclr_loss(z, z, z, z, support, temperature=0.1)
    with pytest.raises(ValueError, match=r"^nnclr_loss needs p1, p2, z1, z2 of one shape"):
        nnclr_loss(z, z, z[:1], z, torch.ones(3, 3), temperature=0.1)
    with pytest.raises(ValueError, match=r"^nnclr_loss needs temperature above 0"):
        nnclr_loss(z, z, z, z, torch.ones(3, 3), temperature=0.0)

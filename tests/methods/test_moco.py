"""MoCo against the update order of its pseudocode, written out."""

import math

import pytest
import torch

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.methods.moco import MoCo, MoCoConfig
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, follow, toy_batches, toy_method, train


def moco(*, batch_norm=True, **changes):
    settings = {"queue_size": 12, "projector_hidden_dim": 7, "projector_dim": 5, "temperature": 0.3}
    settings["teacher_momentum"] = Schedule(value=0.8)
    return toy_method(MoCo, MoCoConfig(name="moco", **(settings | changes)), batch_norm=batch_norm)


def facts(global_batch):
    return RunFacts(100, None, global_batch, {"view": (2,)}, (0.5,) * 3, (0.5,) * 3)


def cross_entropy_of_first(query, key, queue, temperature):
    unit = [vector / vector.norm() for vector in (query, key, *queue)]
    scores = [(unit[0] @ other / temperature).exp() for other in unit[1:]]
    return -(scores[0] / sum(scores)).log()


@pytest.mark.parametrize("num_steps", [1, 3, 4])  # the queue holds the keys of three steps
def test_steps_follow_the_pseudocode(num_steps):
    method = moco()
    query, key = (
        copies(method.student.backbone, method.student.head),
        copies(method.student.backbone, method.student.head),
    )
    queue, next_row, losses = method.queue.features.clone(), 0, []
    for batch in toy_batches(num_steps):
        first, second = batch.views["view"]
        q = query(first)
        with torch.no_grad():
            follow(key, query, 0.8)
            k = key(second)
        loss = sum(cross_entropy_of_first(q[i], k[i], queue, 0.3) for i in range(4)) / 4
        query.zero_grad()
        loss.backward()
        descend(query, lr=0.5)
        for vector in k:
            queue[next_row] = vector / vector.norm()
            next_row = (next_row + 1) % 12
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(num_steps), lr=0.5), torch.stack(losses))
    torch.testing.assert_close(method.queue.features, queue)
    assert_same_tensors(method.student, query)
    follow(key, query, 0.8)  # ours is updated for the next step already
    assert_same_tensors(method.teacher.network, key)


def test_a_scheduled_momentum_is_that_of_the_step_that_reads_the_keys():
    method = moco(teacher_momentum=Schedule(value=0.5, final=1.0))
    query, key = (
        copies(method.student.backbone, method.student.head),
        copies(method.student.backbone, method.student.head),
    )
    with torch.no_grad():
        for parameter in (*query.parameters(), *method.student.parameters()):
            parameter.mul_(1.5)
    (batch,) = toy_batches(1)
    method.after_step([method(batch, Progress(0, 4, 2)).carry], Progress(0, 4, 2))
    follow(key, query, 1 - 0.5 * (1 + math.cos(math.pi / 4)) / 2)  # step 1 of 4
    torch.testing.assert_close(list(method.teacher.parameters()), list(key.parameters()))


def test_both_directions_read_the_queue_before_either_is_added():
    method = moco(symmetric=True, queue_size=16)
    (batch,) = toy_batches(1)
    first, second = batch.views["view"]
    before, losses, keys = method.queue.features.clone(), [], []
    for query_view, key_view in ((first, second), (second, first)):
        q, k = method.student(query_view), method.teacher(key_view)
        losses += [cross_entropy_of_first(q[i], k[i], before, 0.3) for i in range(4)]
        keys.append(torch.nn.functional.normalize(k, dim=1))
    output = method(batch, Progress(0, 1, 1))
    torch.testing.assert_close(output.loss, sum(losses) / 8)
    method.after_step([output.carry], Progress(0, 1, 1))
    torch.testing.assert_close(method.queue.features, torch.cat([*keys, before[8:]]))


@pytest.mark.parametrize("symmetric", [False, True])
def test_micro_batches_are_one_big_batch_without_batch_norm(symmetric):
    (batch,) = toy_batches(1, num_images=6)
    progress = Progress(0, 1, 1)
    whole = moco(batch_norm=False, symmetric=symmetric)
    output = whole(batch, progress)
    output.loss.backward()
    whole.after_step([output.carry], progress)
    parted, carries = moco(batch_norm=False, symmetric=symmetric), []
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        micro = Batch({"view": batch.views["view"][:, part]}, batch.labels[part], batch.sample_ids[part])
        output = parted(micro, progress)
        (output.loss / 3).backward()
        carries.append(output.carry)
    parted.after_step(carries, progress)
    torch.testing.assert_close(parted.queue.features, whole.queue.features)
    gradients = [[parameter.grad for parameter in method.student.parameters()] for method in (parted, whole)]
    torch.testing.assert_close(*gradients)


def test_forward_leaves_queue_and_teacher_alone():
    method = moco(batch_norm=False)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    (batch,) = toy_batches(1)
    method(batch, Progress(0, 1, 1))
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_the_defaults_are_those_of_version_2():
    config = MoCoConfig(name="moco")
    assert (config.queue_size, config.temperature, config.projector_dim) == (65536, 0.2, 128)
    assert [config.teacher_momentum(Progress(step, 10, 1)) for step in (0, 9)] == [0.999, 0.999]
    layers = [type(layer).__name__ for layer in moco().student.head]
    assert layers == ["Linear", "ReLU", "Linear"]
    assert all(layer.bias is not None for layer in moco().student.head if hasattr(layer, "bias"))


def test_version_1_has_one_linear_layer():
    (layer,) = moco(projector_layers=1).student.head
    assert (layer.in_features, layer.out_features, layer.bias is not None) == (6, 5, True)


@pytest.mark.parametrize(
    ("symmetric", "global_batch", "sentence"),
    [
        (False, 5, r"multiple of the 5 keys that a step brings \(global batch 5\). Got 12; try 10\.$"),
        (True, 4, r"multiple of the 8 keys that a step brings \(global batch 4\). Got 12; try 16\.$"),
        (False, 40, r"multiple of the 40 keys that a step brings \(global batch 40\). Got 12; try 40\.$"),
    ],
)
def test_a_queue_that_the_keys_of_a_step_do_not_fill_evenly_is_refused(symmetric, global_batch, sentence):
    with pytest.raises(ConfigError, match=r"^method\.queue_size must be a " + sentence):
        moco(symmetric=symmetric).prepare(facts(global_batch))


def test_a_queue_that_they_fill_evenly_is_taken():
    moco().prepare(facts(6))
    moco(symmetric=True).prepare(facts(6))

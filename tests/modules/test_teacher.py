"""The teacher follows the student, and only that way."""

import hashlib

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from ssl_pipeline.config import ConfigError
from ssl_pipeline.modules.teacher import Snapshot, Teacher


def student_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), DropPath(0.5), nn.Linear(4, 2)).double()


def change(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_teacher_starts_as_an_untrained_copy():
    student = student_network()
    teacher = Teacher(student)
    for own, followed in zip(teacher.network.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own, followed.detach(), rtol=0, atol=0)
        assert own.data_ptr() != followed.data_ptr()
        assert not own.requires_grad
        assert followed.requires_grad


def test_an_update_is_the_moving_average():
    student = student_network()
    teacher = Teacher(student)
    before = [parameter.clone() for parameter in teacher.parameters()]
    change(student)
    teacher.update(student, 0.9)
    for own, old, followed in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(own, 0.9 * old + 0.1 * followed.detach())


@pytest.mark.parametrize(("momentum", "follows"), [(1.0, False), (0.0, True)])
def test_the_ends_of_the_momentum_are_exact(momentum, follows):
    student = student_network()
    teacher, start = Teacher(student), [parameter.clone() for parameter in student.parameters()]
    change(student)
    teacher.update(student, momentum)
    expected = list(student.parameters()) if follows else start
    for own, value in zip(teacher.parameters(), expected, strict=True):
        assert torch.equal(own, value)


def test_the_forward_pass_has_no_gradient_and_no_drop_path():
    student = student_network()
    teacher = Teacher(student)
    inputs = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    first, second = teacher(inputs), teacher(inputs)
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert student[2].drop_prob == 0.5


def test_own_buffers_follow_the_teachers_forward_passes():
    student = student_network()
    teacher = Teacher(student)
    student(torch.randn(8, 3, dtype=torch.float64))
    teacher.update(student, 0.5)
    assert teacher.network[1].num_batches_tracked == 0
    teacher(torch.randn(8, 3, dtype=torch.float64))
    assert teacher.network[1].num_batches_tracked == 1


def test_copied_buffers_are_the_students():
    student = student_network()
    teacher = Teacher(student, buffers="copy")
    for _ in range(3):
        student(torch.randn(8, 3, dtype=torch.float64))
    teacher.update(student, 0.999)
    for own, followed in zip(teacher.network.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, followed)
    assert teacher.network[1].num_batches_tracked == 3


def test_the_state_dict_brings_the_teacher_back():
    student = student_network()
    teacher, other = Teacher(student), Teacher(student_network())
    change(student)
    teacher.update(student, 0.5)
    other.load_state_dict(teacher.state_dict())
    for own, restored in zip(teacher.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, restored)


# Snapshots


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def weights_file(folder, content=b"some weights"):
    path = folder / "weights.safetensors"
    path.write_bytes(content)
    return path


def test_a_snapshot_stays_what_it_was():
    source, images = network(), torch.randn(5, 3)
    snapshot = Snapshot(source)
    expected = snapshot(images)
    with torch.no_grad():
        source[0].weight.add_(1)
    source(images)  # moves the statistics of the source
    assert torch.equal(snapshot.train()(images), expected)
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())


def test_a_refreshed_snapshot_is_the_network_of_that_moment():
    snapshot, later, images = Snapshot(network()), network(seed=1), torch.randn(5, 3)
    later(images)
    snapshot.refresh(later)
    assert torch.equal(snapshot(images), later.eval()(images))


def test_a_snapshot_taken_in_training_is_saved_with_the_run():
    snapshot, other = Snapshot(network()), Snapshot(network(seed=1))
    other.load_state_dict(snapshot.state_dict())
    torch.testing.assert_close(other.state_dict(), snapshot.state_dict(), rtol=0, atol=0)


def test_a_snapshot_from_a_file_is_saved_as_the_sum_of_the_file(tmp_path):
    path = weights_file(tmp_path)
    snapshot = Snapshot(network(), source=path)
    (entry,) = snapshot.state_dict().items()
    assert entry[0] == "source_sha256"
    assert bytes(entry[1].tolist()).hex() == hashlib.sha256(b"some weights").hexdigest()
    assert list(snapshot.parameters()) == []
    again = Snapshot(network(seed=1), source=path)
    again.load_state_dict(snapshot.state_dict())
    assert not torch.equal(again.network[0].weight, snapshot.network[0].weight)  # the file's, whatever was saved


def test_a_run_with_another_file_is_refused(tmp_path):
    state = Snapshot(network(), source=weights_file(tmp_path)).state_dict()
    other = Snapshot(network(), source=weights_file(tmp_path, b"other weights"))
    with pytest.raises(ConfigError, match=r"weights\.safetensors' is not the file that this run began with"):
        other.load_state_dict(state)


def test_a_snapshot_from_a_tag_is_saved_as_the_sum_of_its_tensors():
    snapshot = Snapshot(network(), source="a_tag")
    (entry,) = snapshot.state_dict().items()
    assert entry[0] == "source_sha256"
    tensors = {name: tensor.numpy().tobytes() for name, tensor in network().state_dict().items()}
    content = b"".join(name.encode() + tensors[name] for name in sorted(tensors))
    assert bytes(entry[1].tolist()).hex() == hashlib.sha256(content).hexdigest()
    Snapshot(network(), source="a_tag").load_state_dict(snapshot.state_dict())
    with pytest.raises(ConfigError, match="'a_tag' is not the file that this run began with"):
        Snapshot(network(seed=1), source="a_tag").load_state_dict(snapshot.state_dict())


def test_a_snapshot_from_a_file_moves_with_its_module(tmp_path):
    holder = nn.ModuleList([Snapshot(network(), source=weights_file(tmp_path))]).double()
    assert holder[0].network[0].weight.dtype == torch.float64
    assert holder[0](torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64

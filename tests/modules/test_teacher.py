"""The teacher follows the student, and only that way."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from ssl_pipeline.modules.teacher import Teacher


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

"""LARS against the rule written out for one parameter at a time."""

from copy import deepcopy

import pytest
import torch

from ssl_pipeline.optim.lars import LARS

SETTINGS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02}


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 3, 3), (), (5, 2)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[4].zero_()  # its norm is 0, so it is not scaled
    return [tensor.requires_grad_() for tensor in tensors]


def gradients_of_step(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters()]


def one_by_one(values, buffers, gradients, lr, momentum, weight_decay, trust_coefficient, lr_before_momentum=False):
    for value, buffer, gradient in zip(values, buffers, gradients, strict=True):
        direction = gradient
        if value.ndim > 1:
            direction = gradient + weight_decay * value
            if value.norm() > 0 and direction.norm() > 0:
                direction = direction * trust_coefficient * value.norm() / direction.norm()
        if lr_before_momentum:
            buffer.copy_(momentum * buffer + lr * direction)
            value.sub_(buffer)
        else:
            buffer.copy_(momentum * buffer + direction)
            value.sub_(lr * buffer)


@pytest.mark.parametrize("lr_before_momentum", [False, True])
def test_lars_equals_the_rule_written_out(lr_before_momentum):
    settings = {**SETTINGS, "lr_before_momentum": lr_before_momentum}
    ours, values = parameters(), [p.detach().clone() for p in parameters()]
    buffers = [torch.zeros_like(value) for value in values]
    optimizer = LARS(ours, **settings)
    for step in range(4):
        lr = 0.3 / (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        for parameter, gradient in zip(ours, gradients_of_step(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        one_by_one(values, buffers, gradients_of_step(step), **{**settings, "lr": lr})
        torch.testing.assert_close([p.detach() for p in ours], values)


def test_the_place_of_the_learning_rate_matters_only_while_it_changes():
    def trained(rates, **settings):
        tensors = parameters()
        optimizer = LARS(tensors, **SETTINGS, **settings)
        for step, lr in enumerate(rates):
            optimizer.param_groups[0]["lr"] = lr
            for parameter, gradient in zip(tensors, gradients_of_step(step), strict=True):
                parameter.grad = gradient
            optimizer.step()
        return [tensor.detach() for tensor in tensors]

    torch.testing.assert_close(trained([0.3] * 3), trained([0.3] * 3, lr_before_momentum=True))
    changing = trained([0.1, 0.2, 0.3]), trained([0.1, 0.2, 0.3], lr_before_momentum=True)
    assert (changing[0][0] - changing[1][0]).abs().max() > 1e-4


def test_a_gradient_of_zero_moves_nothing():
    parameter = torch.ones(2, 2, requires_grad=True)
    parameter.grad = torch.zeros(2, 2)
    LARS([parameter], lr=1.0).step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_the_gradients_are_left_as_they_are():
    ours = parameters()
    for parameter, gradient in zip(ours, gradients_of_step(0), strict=True):
        parameter.grad = gradient.clone()
    LARS(ours, **SETTINGS).step()
    torch.testing.assert_close([p.grad for p in ours], gradients_of_step(0), rtol=0, atol=0)


def test_parameters_without_gradient_are_passed_over():
    with_gradient, without = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    with_gradient.grad = torch.ones(2, 2)
    optimizer = LARS([with_gradient, without], lr=1.0)
    optimizer.step()
    assert torch.equal(without, torch.ones(2, 2))
    assert len(optimizer.state) == 1


def test_each_group_has_its_own_settings():
    frozen, moving = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    frozen.grad = moving.grad = torch.ones(2, 2)
    LARS([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=1.0).step()
    assert torch.equal(frozen, torch.ones(2, 2))
    torch.testing.assert_close(moving, torch.full((2, 2), 1 - 0.001))


def test_the_state_is_tensors_and_resumes_exactly():
    ours, others = parameters(), parameters()
    optimizer, resumed = LARS(ours, **SETTINGS), LARS(others, **SETTINGS)
    for step in range(3):
        if step == 2:
            for parameter, other in zip(ours, others, strict=True):
                other.data.copy_(parameter.data)
            resumed.load_state_dict(deepcopy(optimizer.state_dict()))
        for group in (ours, others):
            for parameter, gradient in zip(group, gradients_of_step(step), strict=True):
                parameter.grad = gradient
        optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    for state in optimizer.state_dict()["state"].values():
        assert set(state) == {"momentum_buffer"}
        assert isinstance(state["momentum_buffer"], torch.Tensor)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"trust_coefficient": 0.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="LARS needs"):
        LARS(parameters(), **{**SETTINGS, **wrong})

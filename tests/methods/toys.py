"""Small networks, batches and an optimizer's steps for the tests of the methods."""

from copy import deepcopy

import torch
from torch import nn

from ssl_pipeline.batch import Batch
from ssl_pipeline.schedule import Progress


class ToyBackbone(nn.Module):
    """(B, 3, 2, 2) -> (B, 6), with batch norm unless told otherwise."""

    embed_dim = 6

    def __init__(self, *, batch_norm=True):
        super().__init__()
        norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), norm, nn.Tanh())

    def forward(self, images):
        return self.layers(images)


def toy_method(method, config, **backbone):
    torch.manual_seed(0)
    return method(config, ToyBackbone(**backbone)).double()


def toy_batches(num_steps, num_images=4):
    """One batch per step, with two views of each image."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        views = torch.randn(2, num_images, 3, 2, 2, dtype=torch.float64, generator=generator)
        yield Batch({"view": views}, torch.full((num_images,), -1), torch.arange(num_images))


def train(method, batches, *, lr):
    """Plain gradient descent through the method's contract; returns the losses."""
    batches = list(batches)
    losses = []
    for step, batch in enumerate(batches):
        progress = Progress(step, len(batches), steps_per_epoch=2)
        output = method(batch, progress)
        method.zero_grad()
        output.loss.backward()
        descend(method, lr)
        method.after_step([output.carry], progress)
        losses.append(output.loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def descend(network, lr):
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter -= lr * parameter.grad


@torch.no_grad()
def follow(teacher, student, momentum):
    for own, followed in zip(teacher.parameters(), student.parameters(), strict=True):
        own.copy_(momentum * own + (1 - momentum) * followed)


def copies(*modules):
    return nn.Sequential(*deepcopy(modules))


def assert_same_tensors(actual, expected):
    torch.testing.assert_close(list(actual.parameters()), list(expected.parameters()))
    torch.testing.assert_close(list(actual.buffers()), list(expected.buffers()))

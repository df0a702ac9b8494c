"""What a step calls: the method itself on one process, a wrapper that averages gradients on several."""

from __future__ import annotations

import torch

from ssl_pipeline.training.launch import start_accelerator
from ssl_pipeline.training.parallel import wrap
from ssl_pipeline.training.run import TrainConfig
from tests.ranks import run_on_ranks
from tests.tiny import make_method


def wrapped() -> tuple[bool, bool]:
    """Whether the network is the method itself, and whether the method has the state that it had before."""
    method = make_method("dino")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    network, _ = wrap(start_accelerator(TrainConfig(steps=1)), method, optimizer)
    state = method.state_dict()
    return network is method, all(torch.equal(state[name], before[name]) for name in before)


def test_a_wrapper_leaves_the_methods_state_under_its_own_names():
    assert run_on_ranks(wrapped) == [(False, True)] * 2

"""What is called besides `forward` is declared, and the whole state of a method is that of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.training import parallel
from ssl_pipeline.training.launch import start_accelerator
from ssl_pipeline.training.parallel import full_state, register_forward_methods, wrap
from ssl_pipeline.training.run import TrainConfig
from tests.ranks import run_on_ranks
from tests.tiny import make_method


class Tokens(nn.Linear):
    forward_methods = ("embed", "encode")

    def embed(self, images: Tensor) -> Tensor:
        return self(images)

    encode = embed


def test_the_declared_methods_of_all_parts_are_registered(monkeypatch):
    seen = []
    monkeypatch.setattr(parallel, "register_fsdp_forward_method", lambda part, name: seen.append((part, name)))
    tokens = Tokens(2, 2)
    register_forward_methods(nn.ModuleDict({"backbone": nn.Sequential(tokens), "head": nn.Linear(2, 2)}))
    assert seen == [(tokens, "embed"), (tokens, "encode")]


def test_a_declared_method_must_exist():
    tokens = Tokens(2, 2)
    tokens.forward_methods = ("embeded",)
    with pytest.raises(AssertionError, match="Tokens has no method 'embeded'"):
        register_forward_methods(tokens)


def state_after_wrapping() -> dict[str, Tensor]:
    method = make_method("dino")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    network, _ = wrap(start_accelerator(TrainConfig(steps=1)), method, optimizer)
    assert (network is method) == (torch.distributed.get_world_size() == 1)
    state = full_state(method)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    return state


def test_the_whole_state_has_the_methods_own_names_on_every_process():
    first, second = run_on_ranks(state_after_wrapping)
    assert all(torch.equal(first[name], second[name]) for name in first)

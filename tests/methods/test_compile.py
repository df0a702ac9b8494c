"""Compiled parts compute what the plain ones do, and a step goes through them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.modules.classifier import ClassifierPair
from ssl_pipeline.modules.pixel_decoder import PixelDecoder
from tests.tiny import CONFIGS, VIT, make_batch, make_method, progress_at


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(method, name, **autocast):
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        loss = method(make_batch(name), progress_at(1)).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


# one size of views; two sizes and a teacher; entered and left at the tokens
@pytest.mark.slow
@pytest.mark.parametrize(("name", "graphs"), [("simclr", 1), ("dino", 3), ("ibot", 3), ("mae", 2)])
@pytest.mark.parametrize("half", [False, True])
def test_a_compiled_step_is_the_plain_step(name, graphs, half):
    expected = loss_and_gradients(make_method(name), name, enabled=half)
    method, counter = make_method(name), CompileCounter()
    for part in method.parts_to_compile():
        part.compile(
            backend=counter, dynamic=False, fullgraph=True
        )  # traced, not translated, which would take a minute
    assert_close(loss_and_gradients(method, name, enabled=half), expected)
    assert counter.frame_count == graphs
    loss_and_gradients(method, name, enabled=half)
    assert counter.frame_count == graphs, "the second step compiles again"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_backbones_are_compiled_and_a_decoder(name):
    method = make_method(name)
    kinds = [type(part) for part in method.parts_to_compile()]
    num_teachers = isinstance(getattr(method, "pair", None), ClassifierPair) or name in (
        "byol",
        "dino",
        "dinov2",
        "dinov3",
        "distillation",
        "dvae",
        "ibot",
        "moco",
        "moco_v3",
    )
    num_teachers += name == "dinov3"  # a Gram teacher, too
    num_teachers += 2 * (name == "co_training")  # a second pair
    assert sum(issubclass(kind, Backbone) for kind in kinds) == 1 + num_teachers
    assert (PixelDecoder in kinds) == (name == "mae")


def test_compiling_changes_no_name():
    method = make_method("mae", backbone=VIT)
    names = list(method.state_dict())
    for part in method.parts_to_compile():
        part.compile(backend="eager")
    assert list(method.state_dict()) == names

"""What a step needs, counted without computing it, is what it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.memory import batch_of, command, held, kept_for_backward, method_without_values
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.methods import build_method
from ssl_pipeline.schedule import Progress

TINY = [
    "recipe=dinov2_vitl16_short",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.arguments={img_size: 32, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 2}",
    "augment.global.size=32",
    "augment.local.size=16",
    "method.num_prototypes=64",
    "method.head_hidden_dim=32",
    "data.batch_size=4",
    "train.precision=no",
]


def config(*more: str) -> PretrainConfig:
    pairs = dict(pair.split("=", 1) for pair in (*TINY, *more))
    return load(PretrainConfig, [f"{key}={value}" for key, value in pairs.items()], recipes=RECIPES)


def kept(*more: str) -> int:
    return kept_for_backward(method_without_values(config(*more)), config(*more))


def test_weights_gradients_and_averages_are_those_of_the_method():
    method = method_without_values(config())
    every = sum(parameter.numel() for parameter in method.parameters())
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    whole = held(method, activations=7, num_processes=8, sharded=False, bf16=True)
    assert whole.weights == 4 * every + sum(4 * buffer.numel() for buffer in method.buffers())
    assert (whole.gradients, whole.averages, whole.gathered, whole.activations) == (4 * trained, 8 * trained, 0, 7)
    shared = held(method, activations=7, num_processes=8, sharded=True, bf16=True)
    assert 1 <= 8 * shared.averages / whole.averages < 1.1
    assert 0 < shared.gathered < whole.weights


def test_activations_grow_with_images_and_shrink_with_what_saves_them():
    everything = kept()
    assert 1.9 < kept("data.batch_size=8") / everything < 2.1
    assert kept("train.precision=bf16") < 0.8 * everything
    checkpointed, reversible = kept("backbone.checkpoint_activations=true"), kept("backbone.reversible=true")
    assert reversible < checkpointed < 0.6 * everything


def test_what_is_counted_is_what_a_real_step_keeps():
    settings = config()
    method, real = build_method(settings.method, create_backbone(settings.backbone)), dict[int, int]()
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            real[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = batch_of(method, settings)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = method(batch, Progress(step=0, total_steps=2, steps_per_epoch=1))
    assert output.loss.isfinite()
    assert kept() == pytest.approx(sum(real.values()), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["recipe=cifar10_fixmatch_wrn28_2", "data.labelled.shards=none"],
            "FixMatch reads labelled images, which are not counted here",
        ),
        (["recipe=nope"], "No recipe 'nope'"),
        ([*TINY, "processes=0"], "processes[0] must be at least 1. Got 0"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_a_line(capsys, arguments, sentence):
    assert command(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_table_has_a_line_for_each_layout(capsys):
    assert command([*TINY, "processes=1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[3:]] == [["1", "-"], ["2", "ddp"], ["2", "fsdp"]]

"""DINOv2's sweep over what a linear classifier is given: class tokens of one block or several, means of patches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_pipeline.config import run_command
from ssl_pipeline.eval.linear import LinearConfig, ProbeConfig, linear_probe, main
from ssl_pipeline.eval.linear_inputs import token_inputs
from ssl_pipeline.eval.protocol import LabelledFeatures


def test_inputs_are_the_last_block_or_all_of_them_with_the_mean_behind():
    blocks = torch.arange(8.0).repeat(2, 1)  # four blocks of two dimensions
    mean = torch.tensor([[10.0, 11.0], [12.0, 13.0]])
    inputs = token_inputs(blocks, mean)
    assert list(inputs) == ["class 1", "class 4", "class 1 + mean", "class 4 + mean"]
    assert inputs["class 1"].tolist() == [[6.0, 7.0]] * 2
    assert torch.equal(inputs["class 4"], blocks)
    assert inputs["class 1 + mean"].tolist() == [[6.0, 7.0, 10.0, 11.0], [6.0, 7.0, 12.0, 13.0]]
    assert inputs["class 4 + mean"][1].tolist() == [*range(8), 12.0, 13.0]


def test_of_a_network_with_one_block_the_mean_alone_makes_a_difference():
    assert list(token_inputs(torch.ones(2, 3), torch.ones(2, 3))) == ["class 1", "class 1 + mean"]


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_the_input_is_chosen_on_held_out_training_images(solver, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    good = torch.nn.functional.one_hot(labels, 3).float() + 0.1 * torch.randn(120, 3, generator=generator)
    bad = torch.randn(120, 4, generator=generator)
    inputs = {name: (value[:90], value[90:]) for name, value in (("bad", bad), ("good", good))}
    config = ProbeConfig(solver=solver, epochs=20, sgd_batch_size=32)
    own = LabelledFeatures(bad[:90], labels[:90], bad[90:], labels[90:], num_classes=3)
    with monkeypatch.context() as patched:
        patched.setattr("ssl_pipeline.eval.linear.inputs_of", lambda features: inputs)
        found, _ = linear_probe(own, config)
        again, _ = linear_probe(replace(own, test_labels=(labels[90:] + 1) % 3), config)
    settings = len(config.inverse_penalties) if solver == "logistic" else 16
    assert len(found.sweep) == 2 * settings
    assert [row["input"] for row in found.sweep] == ["bad"] * settings + ["good"] * settings
    assert (found.chosen["input"], found.top1) == ("good", 100.0)
    # the same test images under other labels change nothing that was chosen
    assert again.chosen == found.chosen
    assert again.top1 == 0.0
    # each input is trained as if it were alone
    alone, _ = linear_probe(replace(own, train=good[:90], test=good[90:]), config)
    assert [row["validation_top1"] for row in found.sweep[settings:]] == [r["validation_top1"] for r in alone.sweep]
    assert "input" not in alone.chosen


def linear(*arguments: str) -> int:
    given = ["workers=0", "epochs=5", "sgd_batch_size=16", "solver=sgd", *arguments]
    return run_command(LinearConfig, main, command="python -m eval.linear", argv=given)


def test_tokens_of_a_run_are_swept_and_reported_by_class(run: Path, train: str, test: str, capsys):
    assert linear(f"run={run}", f"train={train}", f"test={test}", "inputs=tokens", "baselines=true") == 0
    report = json.loads((run / "eval" / "linear.json").read_text())
    assert report["protocol"]["inputs"] == "tokens"
    assert {row["input"] for row in report["sweep"]} == {"class 1", "class 1 + mean"}  # the network has one block
    assert "input" not in report["baselines"]["raw_pixels"]["chosen"]
    assert {row["input"] for row in report["baselines"]["random"]["sweep"]} == {"class 1", "class 1 + mean"}
    classes = report["by_class"]
    assert sum(row["images"] for row in classes["per_class"]) == 31
    assert 0 <= classes["balanced_accuracy"] <= 100
    printed = capsys.readouterr().out
    assert "* class 1" in printed
    assert "\nlinear probe, pretrained, by class:\n" in printed
    assert "balanced" in printed


def test_without_a_place_for_features_they_are_in_memory(train: str, test: str, capsys):
    arguments = ["backbone=vit_tiny_patch16_224", "arguments={img_size: 16, patch_size: 8, embed_dim: 24, depth: 2}"]
    arguments += ["arguments.num_heads=2", f"train={train}", f"test={test}", "inputs=tokens"]
    assert linear(*arguments) == 0
    assert "class 2 + mean" in capsys.readouterr().out


def test_a_cnn_has_no_tokens_to_sweep(train: str, test: str, capsys):
    given = ["backbone=test_resnet", f"train={train}", f"test={test}", "inputs=tokens", "size=16"]
    assert linear(*given) == 2
    said = capsys.readouterr().err
    assert "inputs=tokens needs a network with tokens. 'test_resnet' has none; take inputs=pooled." in said

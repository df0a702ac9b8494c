"""Gradient norms by layer against norms written out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.optim.gradient_norms import GradientNorms
from tests.ranks import start, start_ranks
from tests.runs import SGD, Happening, command, rows, trained, write_recipe
from tests.tiny import CNN, VIT, make_batch, make_method, progress_at, write_shards


def norm_of(parameters) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5


def test_each_layer_and_each_part_beside_the_backbone_has_its_norm():
    method = make_method("dino")
    method(make_batch("dino"), progress_at(1)).loss.backward()
    norms = GradientNorms(method)
    found = dict(zip(norms.names, norms().tolist(), strict=True))
    vit = method.student.backbone.model
    assert list(found) == [f"student.backbone.layer0{layer}" for layer in (0, 1, 2)] + ["student.head"]
    assert found["student.backbone.layer01"] == pytest.approx(norm_of(vit.blocks[0].parameters()), rel=1e-5)
    assert found["student.backbone.layer02"] == pytest.approx(norm_of(vit.norm.parameters()), rel=1e-5)
    first = [vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters()]
    assert found["student.backbone.layer00"] == pytest.approx(norm_of(first), rel=1e-5)
    trained = [p for p in method.student.head.parameters() if p.requires_grad]
    assert found["student.head"] == pytest.approx(norm_of(trained), rel=1e-5)


def test_parts_at_the_top_have_their_own_names():
    method = make_method("byol", backbone=CNN)
    names = GradientNorms(method).names
    assert "predictor" in names
    assert [name for name in names if ".layer00" in name]


def test_a_network_of_unknown_layers_is_one_part_and_what_has_no_gradient_counts_nothing():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = create_backbone(VIT)
            self.backbone.model = nn.Linear(2, 3)
            self.extra = nn.Linear(2, 2)

    odd = Odd()
    odd.backbone.model.weight.grad = torch.full((3, 2), 2.0)
    norms = GradientNorms(odd)
    assert norms.names == ("backbone", "extra")
    assert norms().tolist() == pytest.approx([24**0.5, 0.0])


@pytest.mark.ddp
def test_rows_have_them_where_they_are_wanted_and_the_same_on_two_processes(tmp_path):
    shards = write_shards(tmp_path / "shards")
    train = {"steps": 3, "save_every": 100, "log_every": 2, "hang_timeout": 0, "sync_batch_norm": True}
    optim = SGD | {"clip_norm": 0.01}
    recipe = write_recipe(tmp_path / "recipe.yaml", "simclr", shards, optim=optim, train=train)
    wanted, happening = [f"recipe={recipe}", "train.gradient_norms=true"], Happening(float64=True)
    start(trained, [*wanted, f"output={tmp_path / 'one'}"], happening).result()
    together = [*wanted, f"output={tmp_path / 'two'}", "data.batch_size=4"]
    for child in start_ranks(trained, together, happening):
        child.result()
    assert start(command, [f"recipe={recipe}", f"output={tmp_path / 'without'}"]).wait() == 0
    for one, two, without in zip(*(rows(tmp_path / name) for name in ("one", "two", "without")), strict=True):
        norms = {name: value for name, value in one.items() if name.startswith("gradient_norm/")}
        assert len(norms) > 2
        total = sum(value**2 for value in norms.values()) ** 0.5
        assert total == pytest.approx(one["gradient_norm"], rel=1e-5)  # all of it, before clipping
        assert {name: two[name] for name in norms} == pytest.approx(norms, rel=1e-5)
        assert not [name for name in without if "/" in name]
        assert without["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert json.loads((tmp_path / "one" / "status.json").read_text())["state"] == "done"

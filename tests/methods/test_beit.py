"""BEiT against its official code, written out, and the tokenizers that do not fit."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods.beit import BEiT, BEiTConfig
from ssl_pipeline.modules.tokenizer import Tokenizer, save_tokenizer
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.schedule import Progress, Schedule
from ssl_pipeline.training.preflight import check_recipe
from tests.methods.toys import assert_same_tensors, descend, train

PROGRESS = Progress(0, 1, 1)
DALLE = BackboneConfig(name="dalle_encoder", arguments={"hidden_dim": 4, "blocks_per_group": 1})
ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "global_pool": "token"}
MEAN, STD = (-0.125,) * 3, (1.25,) * 3
SIZES = {"image": (16,), "tokens": (32,)}


@pytest.fixture
def tokenizer(tmp_path):
    """A file of a tokenizer with six codes of 8 pixels."""
    torch.manual_seed(4)
    network, path = Tokenizer(create_backbone(DALLE), 6), tmp_path / "tokenizer.safetensors"
    with torch.no_grad():
        network.head.bias -= network(torch.randn(16, 3, 32, 32)).mean(dim=(0, 2, 3))  # else one code is all cells'
    save_tokenizer(path, network, mean=MEAN, std=STD)
    return path


def facts(sizes=SIZES, mean=MEAN, std=STD):
    groups = {"group_mean": {"tokens": mean}, "group_std": {"tokens": std}}
    return RunFacts(100, None, 8, sizes, (0.5,) * 3, (0.5,) * 3, **groups)


def beit(path, *, prepared=True, **changes):
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name="beit_base_patch16_224", arguments=ARGUMENTS | SHARED))
    settings = {"num_tokens": 6, "num_masked": 6, "min_block": 2, **changes}
    method = BEiT(BEiTConfig(name="beit", tokenizer=path, **settings), backbone)
    if prepared:
        method.prepare(facts())
    return method.double()


def batches(num_steps, *, count=3):
    """Images of 16 pixels with masks of different sizes, and of 32 for the tokenizer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        views = {
            name: torch.randn(1, count, 3, size, size, generator=generator, dtype=torch.float64)
            for name, (size,) in SIZES.items()
        }
        order = torch.rand(1, count, 16, generator=generator).argsort(dim=-1)
        masks = order < torch.tensor([6, 4, 5])[None, :count, None]
        yield Batch(views, torch.full((count,), -1), torch.arange(count), {"image": masks})


def official_loss(model, mask_token, head, codes, images, masks):
    """The official forward pass."""
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    w = masks[:, :, None].to(x.dtype)
    x = x * (1 - w) + mask_token * w
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    bias = model.rel_pos_bias()
    for block in model.blocks:
        x = block(x, shared_rel_pos_bias=bias)
    x = model.norm(x)[:, 1:]
    terms = []
    for n in range(len(images)):
        for patch in range(16):
            if masks[n, patch]:
                logits = head.weight @ x[n, patch] + head.bias
                terms.append(torch.logsumexp(logits, dim=0) - logits[codes[n, patch]])
    return torch.stack(terms).mean()


def test_ten_steps_follow_the_official_code(tokenizer):
    method = beit(tokenizer)
    model, head = deepcopy(method.encoder.model), deepcopy(method.head)
    token, losses, seen = nn.Parameter(method.mask_token.detach().clone()), [], set()
    frozen = deepcopy(method.tokenizer.network)
    whole = nn.ModuleList([model, head, nn.ParameterList([token])])
    for batch in batches(10):
        logits = frozen(batch.views["tokens"][0])
        codes = torch.stack([logits[:, :, row, column].argmax(dim=1) for row in range(4) for column in range(4)], dim=1)
        seen |= set(codes.flatten().tolist())
        loss = official_loss(model, token, head, codes, batch.views["image"][0], batch.masks["image"][0])
        whole.zero_grad()
        loss.backward()
        descend(whole, lr=0.5)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, batches(10), lr=0.5), torch.stack(losses))
    assert_same_tensors(method.encoder.model, model)
    assert_same_tensors(method.head, head)
    torch.testing.assert_close(method.mask_token, token)
    assert len(seen) > 1
    assert losses[-1] < losses[0]


def test_the_tokenizer_sees_the_whole_image_and_is_not_saved(tokenizer):
    method, (batch,) = beit(tokenizer), batches(1)
    assert [name for name in method.state_dict() if "tokenizer" in name] == ["tokenizer.source_sha256"]
    assert not method.train().tokenizer.network.training
    assert not any("tokenizer" in name for name, _ in method.named_parameters())
    loss = method(batch, PROGRESS).loss
    batch.views["tokens"] = -batch.views["tokens"]
    assert not torch.equal(method(batch, PROGRESS).loss, loss)


def test_the_accuracy_is_that_over_masked_patches(tokenizer):
    method, (batch,) = beit(tokenizer), batches(1)
    codes = method.tokenizer.network.tokens(batch.views["tokens"][0])
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(torch.eye(6)[2])
    masks = batch.masks["image"][0]
    expected = (codes[masks] == 2).double().mean()
    torch.testing.assert_close(method(batch, PROGRESS).metrics["token_accuracy"], expected)


def test_a_collapse_shows(tokenizer):
    method, (batch,) = beit(tokenizer), batches(1)
    assert method(batch, PROGRESS).metrics["feature_std"] > 1e-3
    batch.views["image"][:], batch.masks["image"][:] = batch.views["image"][:, :1], batch.masks["image"][:, :1]
    assert method(batch, PROGRESS).metrics["feature_std"] < 1e-6


def test_the_defaults_are_the_official_ones():
    config = BEiTConfig(name="beit", tokenizer=Path("x"))
    assert (config.num_tokens, config.num_masked, config.min_block, config.min_aspect) == (8192, 75, 16, 0.3)
    assert (config.max_block, config.exact_number) == (None, False)


def test_class_token_is_spared_weight_decay_and_mask_token_and_relative_positions_are_not(tokenizer):
    method = beit(tokenizer, prepared=False)
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=Schedule(value=1e-3)))
    decays = {id(p): group["decays"] for group in optimizer.param_groups for p in group["params"]}
    spared = {name for name, p in method.named_parameters() if not decays[id(p)] and p.ndim > 1}
    assert spared == {"encoder.model.cls_token"}
    assert decays[id(method.mask_token)]
    assert decays[id(method.encoder.model.rel_pos_bias.relative_position_bias_table)]


# what does not fit


@pytest.mark.parametrize(
    ("changes", "given", "sentence"),
    [
        ({"num_tokens": 8}, {}, r"num_tokens must be the number of codes of .*safetensors, 6\. Got 8\.$"),
        ({}, {"sizes": {"image": (16,), "tokens": (16,)}}, r"tokens\.size must be 32 for images of 16 .* Got 16\.$"),
        (
            {},
            {"mean": (0.5,) * 3},
            r"was trained on images with mean \[-0\.125, .* set augment\.tokens\.mean and \.std",
        ),
        ({"num_masked": 16}, {}, r"num_masked must be below the 16 patches of an image of 16 pixels\. Got 16\.$"),
        ({}, {"sizes": {"image": (32,), "tokens": (64,)}}, r"its own size, 16x16\. Got 32x32\. Try backbone\.arg"),
    ],
)
def test_what_does_not_fit_is_told_before_training(tokenizer, changes, given, sentence):
    method = beit(tokenizer, prepared=False, **changes)
    with pytest.raises(ConfigError, match=sentence):
        method.prepare(facts(**given))


def test_a_missing_tokenizer_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"^There is no tokenizer .*none\.safetensors\. Train one: method\.name=dvae"):
        beit(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("resnet18", r"^BEiT needs a backbone with patch tokens"), ("swin_tiny_patch4_window7_224", "merges its patches")],
)
def test_other_networks_are_refused(name, sentence):
    with torch.device("meta"), pytest.raises(ConfigError, match=sentence):
        BEiT(BEiTConfig(name="beit", tokenizer=Path("x")), create_backbone(BackboneConfig(name=name)))


def recipe(*argv):
    return load(PretrainConfig, ["recipe=beit_vitb16", *argv], recipes=RECIPES)


def check(config):
    with torch.device("meta"):
        method = BEiT(config.method, create_backbone(config.backbone))
    check_recipe(method, method.backbone, config.augment, config.data)
    return method


def test_a_token_view_of_another_crop_is_refused():
    with pytest.raises(ConfigError, match=r"^augment\.tokens\.crops_of must be image for BEiT, .* Got none\.$"):
        check(recipe("augment.tokens.crops_of=null"))


# the recipe


def test_the_recipe_masks_and_trains_as_the_official_command_on_16_processes():
    config = recipe()
    method, lr = check(config), config.optim.effective_lr(2048)
    assert 16 * config.data.batch_size == 2048
    rates = [lr(Progress(epoch * 10, 8000, 10)) for epoch in (10, 800)]
    assert rates == pytest.approx([1.5e-3, 1e-5])
    rule = method.needs[0].mask
    assert (rule.kind, rule.num_masked, rule.min_block, rule.min_aspect) == ("blocks", 75, 16, 0.3)
    assert method.encoder.grid == (14, 14)
    assert config.augment["tokens"].size == 14 * 8


def test_both_views_have_the_same_box_flip_and_colours():
    config = recipe()
    sampler = ViewSampler(config.augment, {}, seed=0, global_batch=4)
    sides = np.full(4, 300)
    drawn = sampler.draw(
        [0, 1, 2, 3], epochs_B=np.zeros(4, np.int64), samples_B=np.arange(4), heights_B=sides, widths_B=sides
    )
    for name in ("boxes", "flips", "draws"):
        assert np.array_equal(getattr(drawn["image"], name), getattr(drawn["tokens"], name)), name

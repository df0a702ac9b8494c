"""The discrete VAE against plain steps, its noise, its metrics and what it leaves."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods.dvae import DALLE_MEAN, DALLE_STD, DVAE, DVAEConfig, codes_in_use
from ssl_pipeline.modules.tokenizer import load_tokenizer
from ssl_pipeline.randomness import uniform_noise
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.methods.toys import assert_same_tensors, descend, follow, train

DALLE = BackboneConfig(name="dalle_encoder", arguments={"hidden_dim": 4, "blocks_per_group": 1})


def dvae(backbone=DALLE, **changes):
    torch.manual_seed(0)
    settings = {"num_tokens": 6, "decoder_hidden_dim": 4, "decoder_first_dim": 4, "decoder_blocks": 1, **changes}
    return DVAE(DVAEConfig(name="dvae", **settings), create_backbone(backbone)).double()


def batches(num_steps, *, count=3):
    """Images of 16 pixels with values between 0.1 and 0.9."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        images = 0.1 + 0.8 * torch.rand(1, count, 3, 16, 16, generator=generator, dtype=torch.float64)
        yield Batch({"image": images}, torch.full((count,), -1), torch.arange(count) + 10)


def facts(size=16, mean=DALLE_MEAN, std=DALLE_STD):
    return RunFacts(100, None, 8, {"image": (size,)}, mean, std)


@pytest.mark.parametrize("reconstruction", ["logit_laplace", "mse"])
def test_ten_steps_follow_the_formulas(reconstruction, monkeypatch):
    temperature = Schedule(value=1.0, final=0.25, decay="linear")
    kl_weight = Schedule(value=0.5, warmup=Duration(4))
    method = dvae(reconstruction=reconstruction, temperature=temperature, kl_weight=kl_weight, average_momentum=0.8)
    noises = -(-(torch.rand(10, 3, 6, 2, 2, generator=torch.Generator().manual_seed(2)).double().log())).log()
    monkeypatch.setattr(DVAE, "_noise", lambda self, batch, progress, like: noises[progress.step])
    network = nn.ModuleList([deepcopy(method.tokenizer), deepcopy(method.decoder)])
    average, losses = deepcopy(method.tokenizer), []
    for step, batch in enumerate(batches(10)):
        images = batch.views["image"][0]
        its_map = network[0].encoder.model.blocks(images).relu()
        logits = torch.einsum("ndrc,kd->nkrc", its_map, network[0].head.weight[:, :, 0, 0])
        logits = logits + network[0].head.bias[:, None, None]
        warm = ((logits + noises[step]) / (1.0 - 0.75 * max(step, 0) / 10)).exp()
        painted = network[1](warm / warm.sum(dim=1, keepdim=True))
        if reconstruction == "mse":
            error = (painted - images).square().mean()
        else:
            mu, b = painted[:, :3], painted[:, 3:].exp()
            error = ((2 * b * images * (1 - images)).log() + (torch.logit(images) - mu).abs() / b).mean()
        q = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        kl = (q * (q.log() + math.log(6))).sum(dim=1).mean()
        loss = error + 0.5 * min(step / 4, 1.0) * kl
        network.zero_grad()
        loss.backward()
        descend(network, lr=0.1)
        follow(average, network[0], 0.8)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, batches(10), lr=0.1), torch.stack(losses))
    assert_same_tensors(method.tokenizer, network[0])
    assert_same_tensors(method.decoder, network[1])
    assert_same_tensors(method.average.network, average)


# noise


def test_noise_is_gumbels():
    uniforms = uniform_noise(torch.arange(40).reshape(20, 2), 20_000, dtype=torch.float64)
    assert uniforms.min() > 0
    assert uniforms.max() < 1
    counts = torch.histc(uniforms.flatten(), bins=50, min=0, max=1)
    expected = uniforms.numel() / 50
    assert ((counts - expected).square() / expected).sum() < 49 + 5 * math.sqrt(2 * 49)  # chi-squared
    centred = uniforms - 0.5
    for lag in (1, 2, 7):  # neighbours in a row, and rows that follow each other
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean() * 12) < 0.01
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 0.01


def test_float32_holds_the_smallest_and_the_largest_number():
    # of 30 million numbers with 24 bits some would be rounded to 1, whose noise is infinite
    uniforms = uniform_noise(torch.arange(300)[:, None], 100_000, dtype=torch.float32)
    assert 0 < uniforms.min() < 1e-6
    assert 1 - 1e-6 < uniforms.max() < 1


def test_noise_follows_from_run_step_and_image_alone():
    method, (batch,) = dvae(), batches(1)
    like = torch.zeros(3, 6, 2, 2, dtype=torch.float64)
    noise = method._noise(batch, Progress(5, 10, 1), like)
    turned = replace(batch, sample_ids=batch.sample_ids.flip(0))
    assert torch.equal(method._noise(turned, Progress(5, 10, 1), like).flip(0), noise)  # whatever its place
    assert not torch.equal(method._noise(batch, Progress(6, 10, 1), like), noise)
    method.noise_key += 1
    assert not torch.equal(method._noise(batch, Progress(5, 10, 1), like), noise)
    views = replace(batch, views={"image": batch.views["image"].expand(2, -1, -1, -1, -1)})
    of_two = method._noise(views, Progress(5, 10, 1), torch.cat([like, like]))
    assert not torch.equal(of_two[:3], of_two[3:])


# metrics


def test_codes_in_use_are_counted():
    logits = torch.full((1, 4, 1, 4), -9.0)
    for cell, code in enumerate([0, 0, 2, 2]):
        logits[0, code, 0, cell] = 9.0
    found = codes_in_use(logits)
    assert found["codes_used"].item() == 2
    assert found["code_perplexity"].item() == pytest.approx(2)


def test_a_collapse_shows():
    method, (batch,) = dvae(), batches(1)
    batch.views["image"][:] = 0.5
    metrics = method(batch, Progress(0, 1, 1)).metrics
    assert metrics["feature_std"] < 1e-6
    assert metrics["codes_used"] <= 4  # one for each cell of the same image


# settings, refusals, export


def test_the_defaults_are_the_papers():
    config = DVAEConfig(name="dvae")
    at = {step: Progress(step, 1_200_000, 1000) for step in (0, 2500, 5000, 150_000, 900_000)}
    assert [config.temperature(at[step]) for step in (0, 150_000, 900_000)] == [1.0, 1 / 16, 1 / 16]
    assert [config.kl_weight(at[step]) for step in (0, 2500, 5000)] == pytest.approx([0, 3.3 / 192, 6.6 / 192])
    assert (config.num_tokens, config.average_momentum, config.reconstruction) == (8192, 0.999, "logit_laplace")


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="final must be above 0"):
        DVAEConfig(name="dvae", temperature=Schedule(value=1.0, final=0.0))


def test_other_pixels_than_the_likelihoods_are_refused():
    with pytest.raises(ConfigError, match=r"^method\.reconstruction=logit_laplace needs images with mean \[-0\.125"):
        dvae().prepare(facts(mean=(0.5,) * 3, std=(0.5,) * 3))
    dvae(reconstruction="mse").prepare(facts(mean=(0.5,) * 3, std=(0.5,) * 3))


def test_a_size_without_whole_codes_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of the pixels of a code, 8\. Got 20; try 16\.$"):
        dvae().prepare(facts(size=20))


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_weights_behind_the_map_are_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=r"up to its feature map\. .* after it; try a"):
        dvae(BackboneConfig(name=name))


def test_a_finished_run_leaves_the_averaged_tokenizer(tmp_path):
    method = dvae().float()
    method.prepare(facts())
    with torch.no_grad():
        method.tokenizer.head.bias += 1
    method.export(tmp_path)
    loaded, mean, std = load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert (mean, std) == (DALLE_MEAN, DALLE_STD)
    torch.testing.assert_close(loaded.state_dict(), method.average.network.state_dict(), rtol=0, atol=0)


def test_the_recipe_makes_the_papers_steps():
    config = load(PretrainConfig, ["recipe=dvae_dalle"], recipes=RECIPES)
    lr = config.optim.effective_lr(8 * config.data.batch_size)
    assert (8 * config.data.batch_size, config.train.steps) == (512, 1_200_000)
    rates = [lr(Progress(step, 1_200_000, 1000)) for step in (0, 600_000, 1_200_000)]
    assert rates == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6])
    assert config.optim.weight_decay.value == 1e-4
    assert (config.data.mean, config.data.std) == (DALLE_MEAN, DALLE_STD)

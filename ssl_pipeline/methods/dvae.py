"""The discrete VAE of DALL-E (Ramesh et al., 2021, https://arxiv.org/abs/2102.12092), whose codes BEiT predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, TokenBackbone, require_tokens
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError, Depth, InRange, Width
from ssl_pipeline.distributed import mean_over_ranks
from ssl_pipeline.losses import gumbel_softmax, logit_laplace_loss, uniform_kl_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.modules.tokenizer import FILE_NAME, Channels, TokenDecoder, Tokenizer, save_tokenizer
from ssl_pipeline.randomness import uniform_noise
from ssl_pipeline.schedule import Duration, Progress, Schedule

DALLE_MEAN, DALLE_STD = (-0.125, -0.125, -0.125), (1.25, 1.25, 1.25)  # (pixel - mean) / std = 0.8 * pixel + 0.1


class DVAEConfig(Config):
    """Discrete VAE: an encoder writes an image as codes, from which a decoder paints it again."""

    name: Literal["dvae"]
    num_tokens: int = Field(8192, gt=1)
    """How many codes there are."""
    reconstruction: Literal["logit_laplace", "mse"] = "logit_laplace"
    """logit_laplace: DALL-E's likelihood, of images with mean -0.125 and std 1.25; mse: the squared error."""
    temperature: Annotated[Schedule, InRange(gt=0)] = Schedule(value=1.0, final=1 / 16, decay_for=Duration(150_000))
    """Temperature of the mixture of codes that the decoder sees."""
    kl_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=6.6 / 192, warmup=Duration(5000), rise="cosine")
    """Weight of the divergence of a cell's codes from the uniform distribution."""
    average_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the averaged tokenizer, the one that is exported, that an update keeps."""
    decoder_hidden_dim: Width = 256
    """Width of the decoder's last blocks; each group before them is twice as wide."""
    decoder_first_dim: Width = 128
    """Width of what the decoder makes of a mixture of codes."""
    decoder_blocks: Depth = 2
    """Blocks in each group of the decoder."""


class DVAE(Method):
    """Any backbone with a map as encoder (DALL-E's: `dalle_encoder`), and a decoder as large as its stride asks.

    A finished run leaves the moving average of the tokenizer in `tokenizer.safetensors`. The noise of an image follows
    from the run's seed, the step and the image, so that it is the same on any number of processes.
    """

    config_class = DVAEConfig
    needs = (Views("image"),)

    noise_key: Tensor
    _normalisation: tuple[Channels, Channels] | None = None

    def __init__(self, config: DVAEConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        _check_head(backbone)
        self.tokenizer = Tokenizer(backbone, config.num_tokens)
        self.average = Teacher(self.tokenizer, buffers="copy")
        self.decoder = TokenDecoder(
            config.num_tokens,
            self.tokenizer.stride,
            channels=6 if config.reconstruction == "logit_laplace" else 3,
            first_dim=config.decoder_first_dim,
            hidden_dim=config.decoder_hidden_dim,
            blocks_per_group=config.decoder_blocks,
        )
        self.register_buffer("noise_key", torch.randint(2**31, ()))

    def prepare(self, facts: RunFacts) -> None:
        stride = self.tokenizer.stride
        for size in facts.view_sizes["image"]:
            if size % stride:
                raise ConfigError(
                    f"augment.image.size must be a multiple of the pixels of a code, {stride}. "
                    f"Got {size}; try {max(round(size / stride), 1) * stride}."
                )
        if self.config.reconstruction == "logit_laplace":
            facts.require_normalisation("image", DALLE_MEAN, DALLE_STD, why="method.reconstruction=logit_laplace needs")
        self._normalisation = facts.normalisation("image")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views["image"].flatten(0, 1)
        features, logits_NKRC = self.tokenizer.features_and_logits(images)
        noise_NKRC = self._noise(batch, progress, logits_NKRC)
        mixtures = gumbel_softmax(logits_NKRC, noise_NKRC, temperature=self.config.temperature(progress))
        painted = self.decoder(mixtures)
        if self.config.reconstruction == "logit_laplace":
            reconstruction = logit_laplace_loss(images, painted)
        else:
            reconstruction = F.mse_loss(painted.to(images.dtype), images)
        kl = uniform_kl_loss(logits_NKRC)
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        metrics |= codes_in_use(logits_NKRC.detach()) | {"feature_std": feature_std(features.detach(), progress)}
        return StepOutput(reconstruction + self.config.kl_weight(progress) * kl, metrics)

    def reconstruct(self, batch: Batch) -> Tensor:
        """From only the most likely code of each cell, as the tokenizer is used later."""
        images = batch.views["image"].flatten(0, 1)
        _, logits_NKRC = self.tokenizer.features_and_logits(images)
        codes = F.one_hot(logits_NKRC.argmax(dim=1), logits_NKRC.shape[1]).movedim(-1, 1)
        painted = self.decoder(codes.to(images.dtype))
        return painted[:, :3].sigmoid() if self.config.reconstruction == "logit_laplace" else painted

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.average.update(self.tokenizer, self.config.average_momentum)

    def backbones(self) -> dict[str, Backbone]:
        return {"average": self.average.network.encoder, "encoder": self.tokenizer.encoder}

    def parts_to_compile(self) -> list[nn.Module]:
        return [*super().parts_to_compile(), self.decoder]

    def export(self, directory: Path) -> None:
        assert self._normalisation is not None, "a run is prepared before it begins"
        mean, std = self._normalisation
        save_tokenizer(directory / FILE_NAME, self.average.network, mean=mean, std=std)

    @torch.no_grad()
    def _noise(self, batch: Batch, progress: Progress, like_NKRC: Tensor) -> Tensor:
        """Gumbel noise for each image, code and cell."""
        views = torch.arange(len(batch.views["image"]), device=batch.sample_ids.device)
        keys_N4 = torch.stack(
            torch.broadcast_tensors(
                self.noise_key, torch.full_like(self.noise_key, progress.step), views[:, None], batch.sample_ids
            ),
            dim=-1,
        ).flatten(0, 1)
        shape = like_NKRC.shape[1:]
        dtype = torch.promote_types(like_NKRC.dtype, torch.float32)
        uniforms = uniform_noise(keys_N4, shape[0] * shape[1] * shape[2], dtype=dtype)
        return uniforms.log_().neg_().log_().neg_().unflatten(1, shape)


@torch.no_grad()
def codes_in_use(logits_NKRC: Tensor) -> dict[str, Tensor]:
    """How many codes are the most likely of some cell, over all processes, and exp(entropy) of their frequencies."""
    codes = logits_NKRC.argmax(dim=1).flatten()
    counts_K = torch.zeros(logits_NKRC.shape[1], device=codes.device)
    counts_K = mean_over_ranks(counts_K.scatter_add(0, codes, torch.ones_like(codes, dtype=counts_K.dtype)))
    shares_K = counts_K / counts_K.sum()
    entropy = -torch.special.xlogy(shares_K, shares_K).sum()
    return {"codes_used": (counts_K > 0).sum().float(), "code_perplexity": entropy.exp()}


def _check_head(backbone: Backbone) -> None:
    """Raises ConfigError if weights follow the map, which would not be trained."""
    if isinstance(backbone, TokenBackbone):
        require_tokens(backbone, "DVAE", no_pooling=True)
        return
    behind = [
        name for name, _ in backbone.model.named_parameters() if name.startswith(("head.", "conv_head.", "norm_"))
    ]
    if behind:
        raise ConfigError(
            f"DVAE trains a network up to its feature map. '{backbone.name}' has {behind[0]} after it; try a "
            "ResNet or dalle_encoder."
        )

"""A timm model as a backbone: its features, and for a ViT its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Self

import torch
from timm.layers import DropPath
from timm.models import Beit
from torch import Tensor, nn

from ssl_pipeline.backbones.config import BackboneConfig
from ssl_pipeline.backbones.positions import Grid
from ssl_pipeline.backbones.preprocessing import ImageTransform, Preprocessing
from ssl_pipeline.backbones.tokens import ADAPTERS, NETWORKS_WITH_TOKENS, FlatAdapter, Tokens, has_tokens
from ssl_pipeline.backbones.tokens.base import TimmModel, check_sides, replace_masked
from ssl_pipeline.backbones.weights import RANDOM, Origin
from ssl_pipeline.config import ConfigError


class Backbone(nn.Module):
    """A timm model without its classifier: images (B, C, H, W) -> features (B, embed_dim).

    memory_format: the layout of the model's weights, into which images are brought.
    """

    config: BackboneConfig
    """What `create_backbone` made it from, and makes another one from."""
    origin: Origin = RANDOM
    """Where its weights come from."""
    preprocessing: Preprocessing | None = None
    """What it expects of images, if it comes from a run."""

    def __init__(self, model: nn.Module, *, memory_format: torch.memory_format = torch.channels_last) -> None:
        super().__init__()
        self.model = model
        self.memory_format = memory_format
        self.embed_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
        self.keeps_statistics = False
        """Whether batch norm never leaves evaluation mode."""
        self.is_frozen = False
        """Whether it is not trained and always stays in evaluation mode."""

    @property
    def name(self) -> str:
        """The timm name of its architecture."""
        return getattr(self.model, "default_cfg", {}).get("architecture", type(self.model).__name__)

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; frozen parts (batch norm's statistics, or everything) stay in evaluation mode."""
        super().train(mode and not self.is_frozen)
        if self.keeps_statistics:
            for part in batch_norms(self):
                part.eval()
        return self

    def freeze(self) -> None:
        """Freeze it permanently: no gradient, no new statistics, no drop path."""
        self.requires_grad_(False)
        self.is_frozen = True
        self.eval()

    def transform(self) -> ImageTransform:
        """Makes an image into what this backbone expects: (3, size, size), as the evaluators see it.

        Raises ConfigError if the backbone comes from no run, so that this is unknown.
        """
        if self.preprocessing is None:
            raise ConfigError(
                f"this '{self.name}' does not come from a run, so the images it expects are unknown. "
                "ssl_pipeline.load(run) knows them; otherwise set backbone.preprocessing."
            )
        return ImageTransform(self.preprocessing)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, embed_dim), those of `forward`, and the map (B, D, rows, columns) that they are pooled from.

        Raises ConfigError if the network has no such map.
        """
        network: TimmModel = self.model
        inner = network.forward_features(images.contiguous(memory_format=self.memory_format))
        if inner.ndim == 4 and network.num_features in (inner.shape[1], inner.shape[3]):
            channels_first = inner.shape[1] == network.num_features
            return network.forward_head(inner), inner if channels_first else inner.movedim(3, 1)
        raise ConfigError(f"'{self.name}' has no feature map. Networks with one: CNNs, and {NETWORKS_WITH_TOKENS}.")

    def map_shape(self, size: int) -> tuple[int, Grid]:
        """Dimensions and grid of `features_and_map` for images of `size` pixels; nothing is computed."""
        on_meta = deepcopy(self).to("meta").eval()
        with torch.no_grad():
            _, its_map = on_meta.features_and_map(torch.empty(1, 3, size, size, device="meta"))
        return its_map.shape[1], (its_map.shape[2], its_map.shape[3])


class TokenBackbone(Backbone):
    """A timm ViT that can also be entered and left at its tokens; `create_backbone` makes one wherever it can.

    The adapters in `tokens` define which networks there are and how each is run. A position table is learnt for `grid`
    patches and resampled for images of another size.
    """

    model: TimmModel

    def __init__(self, model: TimmModel) -> None:
        super().__init__(model)
        if not has_tokens(model):
            raise ConfigError(f"'{self.name}' has no patch tokens. Networks with patch tokens: {NETWORKS_WITH_TOKENS}.")
        self._adapter = adapter = ADAPTERS[type(model)](model)
        self.patch_size = adapter.patch_size
        """Side in pixels of the patches that are embedded and masked."""
        self.patch_dim = adapter.patch_dim
        """Width of a mask token: `embed_dim`, except for a Swin."""
        self.grid: Grid = adapter.grid
        """Rows and columns of patches in an image of the network's own size."""
        self.stride = adapter.stride
        """Side in pixels of what a token stands for: `patch_size`, except for a Swin."""
        self.num_blocks = adapter.num_blocks
        self.num_prefix_tokens = adapter.num_prefix_tokens
        """Class token and registers together."""
        self.token_dim = self.embed_dim
        """Width of its tokens: `embed_dim`, unless the features are several of them."""
        self.class_tokens = 0
        """The features are the class tokens of this many last blocks; 0: the network's own features."""
        self.has_patch_mean = False
        """Whether the mean of the patches is appended to the class tokens."""
        self.takes_some_patches = adapter.takes_some_patches
        """Whether `embed`, `embed_patches` and `encode` work: for some of an image's patches, as MAE needs it."""

    def take_class_tokens(self, blocks: int, *, patch_mean: bool) -> None:
        """From now on the features are the class tokens of the last N blocks, and the mean of the patches. Raises
        ConfigError if the network has fewer.
        """
        if getattr(self.model, "cls_token", None) is None:
            raise ConfigError(f"backbone.class_tokens needs a ViT with a class token. '{self.name}' has none.")
        if blocks > self.num_blocks:
            raise ConfigError(
                f"backbone.class_tokens={blocks} is more than '{self.name}' has blocks. Take at most {self.num_blocks}."
            )
        self.class_tokens, self.has_patch_mean = blocks, patch_mean
        self.embed_dim = self.token_dim * (blocks + patch_mean)

    @property
    def takes_class_token_alone(self) -> bool:
        """Whether the features are a class token, not the mean of the patches."""
        own = getattr(self.model, "cls_token", None) is not None and self.model.global_pool == "token"
        return own or (self.class_tokens > 0 and not self.has_patch_mean)

    @property
    def feature_layers(self) -> range:
        """The blocks, counted from the last (-1), whose tokens `pool` needs in `Tokens.layers`."""
        return range(-self.class_tokens, 0)

    def tokens(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Tokens:
        """Images (N, 3, H, W) -> class token, registers and patches after the network's final norm.

        mask: (N, L) bool over patches of `patch_size` pixels, row by row; where it is True the embedded patch is
        replaced by mask_token (`patch_dim` values) before the positions.
        layers: numbers of blocks (0 is the first, -1 the last) whose tokens are wanted too, normalised by the same norm
        (DINOv2's get_intermediate_layers); networks that normalise after pooling leave all tokens as they are.
        """
        if (mask is None) != (mask_token is None):
            given, missing = ("mask_token", "mask") if mask is None else ("mask", "mask_token")
            raise ValueError(f"tokens needs mask and mask_token together. Got {given} without {missing}.")
        patches_NRCD = self._adapter.patches(images)
        if mask is not None and mask_token is not None:
            patches_NRCD = replace_masked(patches_NRCD, mask, mask_token)
        return self._adapter.encode(patches_NRCD, layers)

    def pool(self, tokens: Tokens) -> Tensor:
        """Tokens, with those of `feature_layers` -> features (N, embed_dim), those of `forward` for the same images."""
        if not self.class_tokens:
            return self._adapter.pool(tokens)
        of_blocks = [of_block.cls for of_block in tokens.layers[-self.class_tokens :] if of_block.cls is not None]
        if len(of_blocks) < self.class_tokens:
            raise ValueError(
                f"pool needs the tokens of {self.class_tokens} blocks. Got {len(of_blocks)}: ask for them."
            )
        return torch.cat(of_blocks + [tokens.patches.mean(dim=1)] * self.has_patch_mean, dim=1)

    def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(images, layers=self.feature_layers)
        return self.pool(tokens), tokens.patch_map()

    def map_shape(self, size: int) -> tuple[int, Grid]:
        return self.token_dim, (size // self.stride, size // self.stride)

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> patch tokens with their positions (N, L, embed_dim), row by row."""
        adapter = self._for_some_patches()
        return adapter.embed(adapter.patches(images))

    def embed_patches(self, patches: Tensor, places: Tensor) -> Tensor:
        """Some patches (N, K, p * p * C) of images of the backbone's own size -> their tokens (N, K, embed_dim).

        patches: pixels in the order of `patchify`. places: (N, K), where in its image each patch is, counted row by
        row. The tokens are those of `embed`.
        """
        return self._for_some_patches().embed_some(patches, places)

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Patch tokens (N, L, D), all or some of them -> encoded and normalised (N, 1 + L, D), class token first.

        A model with registers puts them after the class token, one without class token leaves it out: there are
        `num_prefix_tokens` before the patches. places: as of `embed_patches`; networks that rotate tokens by their
        position (DINOv3's) need it unless the tokens are those of a whole image of the backbone's own size.
        """
        adapter, num_patches = self._for_some_patches(), self.grid[0] * self.grid[1]
        if places is None and adapter.rotates and tokens.shape[1] != num_patches:
            raise ValueError(
                f"encode needs the positions of these tokens: '{self.name}' rotates each by its position. "
                f"Got {tokens.shape[1]} tokens of {num_patches} patches."
            )
        encoded, _ = adapter.through(tokens, self.grid, places_NK=places)
        return encoded

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the network does not take images of this height and width in pixels."""
        check_sides(self.model.patch_embed, height, width)

    def require_size(self, size: int, *, group: str, setting: str = "backbone") -> None:
        """Raises ConfigError if the network does not take the views of augment.GROUP, `size` pixels wide.

        setting: where a recipe says what the network is.
        """
        try:
            self.check_size(size, size)
        except ValueError as error:
            own = self.model.patch_embed.img_size
            hint = f" Try {setting}.arguments.img_size={size}." if own is not None and own != (size, size) else ""
            raise ConfigError(f"augment.{group}.size={size} does not suit '{self.name}': {error}{hint}") from None

    def compile(
        self,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        """As `torch.nn.Module.compile`; also for calls that enter or leave at the tokens."""
        super().compile(fullgraph=fullgraph, dynamic=dynamic, backend=backend)
        of_parts = dynamic if self._adapter.compiles_for_any_size else False
        for part in self._adapter.parts_to_compile():
            part.compile(fullgraph=fullgraph, dynamic=of_parts, backend=backend)

    def forward(self, images: Tensor) -> Tensor:
        if self.class_tokens:
            return self.pool(self.tokens(images, layers=self.feature_layers))
        return self._adapter.features(images)

    def _for_some_patches(self) -> FlatAdapter:
        if not self.takes_some_patches or not isinstance(self._adapter, FlatAdapter):
            raise ConfigError(f"'{self.name}' {NEEDS_ALL_PATCHES}")
        return self._adapter


NEEDS_ALL_PATCHES = (
    "needs all patches of an image. Networks that take some of them: timm's VisionTransformer without a stem of "
    "convolutions, Eva, and a Beit without relative positions."
)


def require_tokens(
    backbone: Backbone, method: str, *, some_patches: bool = False, no_pooling: bool = False
) -> TokenBackbone:
    """`backbone`, if it has the tokens that `method` works on.

    some_patches: whether it must be able to take only some of an image's patches. no_pooling: whether all that it
    trains must come before the pooling of its tokens. Raises ConfigError that says which networks do.
    """
    if not isinstance(backbone, TokenBackbone):
        raise ConfigError(
            f"{method} needs a backbone with patch tokens (a ViT). '{backbone.name}' has none. "
            f"Networks with patch tokens: {NETWORKS_WITH_TOKENS}."
        )
    if backbone.class_tokens:
        raise ConfigError(f"{method} works on the tokens of the network itself. Leave backbone.class_tokens out.")
    if some_patches and not backbone.takes_some_patches:
        raise ConfigError(f"{method} leaves patches out, but '{backbone.name}' {NEEDS_ALL_PATCHES}")
    after_pooling = [part for part in ("attn_pool", "fc_norm") if _has_weights(getattr(backbone.model, part, None))]
    if no_pooling and after_pooling:
        setting = "use_fc_norm" if isinstance(backbone.model, Beit) else "fc_norm"
        wanted = backbone.config.arguments | {"global_pool": "avg", setting: False}
        raise ConfigError(
            f"{method} trains a ViT's tokens, not what follows their pooling. '{backbone.name}' has "
            f"{' and '.join(after_pooling)} there; set backbone.arguments='{json.dumps(wanted)}'."
        )
    return backbone


def _has_weights(part: nn.Module | None) -> bool:
    return part is not None and any(True for _ in part.parameters())


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The parts that normalise by statistics of a batch."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def without_drop_path(module: nn.Module) -> None:
    """Switch stochastic depth off permanently, as a teacher needs it."""
    for part in module.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0

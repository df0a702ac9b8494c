"""Weights in files: what is read is checked tensor by tensor, what is written is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from ssl_pipeline.backbones.positions import resample_positions
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import is_shortage

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of tensors under the model's own names.

    A classifier in the file is ignored; a ViT's position table of another size is resampled. Raises ConfigError that
    names the first tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    state = {
        name: value for name, value in _read_tensors(path).items() if name in own or not name.startswith(CLASSIFIERS)
    }
    if isinstance(model, VisionTransformer) and "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = _fit_positions(state["pos_embed"], own["pos_embed"], model)
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    for kind, names in (("misses", missing), ("has unknown", unknown)):
        if names:
            raise ConfigError(f"{path} does not fit: it {kind} {', '.join(names[:3])} ({len(names)} in all).")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ConfigError(
                f"{path} does not fit: {name} must be {tuple(own[name].shape)}. Got {tuple(value.shape)}."
            )
    model.load_state_dict(state)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers have no common error class
        if is_shortage(error):
            raise
        if type(error).__name__ == "UnpicklingError":  # torch's advice is to trust the file
            raise ConfigError(
                f"cannot read weights from {path}: it holds more than tensors, or is damaged; pickled objects are not "
                "read. Save its state dict alone, best as .safetensors."
            ) from None
        raise ConfigError(f"cannot read weights from {path}: {first_line(error)}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path} holds no plain table of tensors by name.")
    return dict(content)


def _fit_positions(table: Tensor, own: Tensor, model: VisionTransformer) -> Tensor:
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    num_patches = table.shape[1] - num_prefix if table.ndim == 3 else 0
    side = round(max(num_patches, 0) ** 0.5)
    if table.shape == own.shape or side == 0 or side * side != num_patches:
        return table
    patches = resample_positions(table[:, num_prefix:], (side, side), model.patch_embed.grid_size)
    return torch.cat([table[:, :num_prefix], patches], dim=1)

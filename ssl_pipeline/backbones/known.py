"""What is known of weights without loading them into a network: their architecture, and the images they expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from ssl_pipeline.backbones.config import RESERVED_ARGUMENTS, architecture_of
from ssl_pipeline.backbones.exported import takes_export
from ssl_pipeline.backbones.weights import find_in_run, holds_checkpoints, is_tag, without_name

EXPORT, MODELS = "backbone.safetensors", ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Known:
    """What is known of weights; None: nothing."""

    network: dict[str, object] | None = None
    """The architecture in BackboneConfig's keys name, arguments, small_images; from a run, an export or a tag."""
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    of: str = ""
    """Where the mean and the standard deviation come from."""


def known_of(weights: str, *, name: str | None, which: str | None = None) -> Known:
    """What is known of `weights`: a tag of timm, a run or its export, a model of Hugging Face, or another file.

    name: the architecture, where it is known; a tag may have it before it (resnet18.a1_in1k). which: the network of a
    run. For a file that says nothing about itself, the
    mean and deviation are those of timm's weights of the architecture, if all of them have the same: a ViT's differ
    between supervised (0.5) and self-supervised ones (ImageNet's). Raises ConfigError for a run without a checkpoint.
    """
    if is_tag(weights):
        name = weights.partition(".")[0] if name is None and names_its_network(weights) else name
        return _of_tag(name, without_name(weights, name)) if name else Known()
    place = Path(weights).expanduser()
    if not place.exists():
        return Known()
    folder = place if place.is_dir() else place.parent
    is_export = takes_export(place, which=which) if place.is_dir() else place.name == EXPORT
    if is_export and (folder / "backbone.json").is_file():
        about = json.loads((folder / "backbone.json").read_bytes())
        return Known(architecture_of(about), about["size"], about["mean"], about["std"], str(place))
    if holds_checkpoints(place):
        _, _, saved = find_in_run(place, which=which)
        return Known(architecture_of(saved.config), saved.size, saved.mean, saved.std, str(place))
    if place.is_dir() or place.name in MODELS:
        mean, std, file = _of_model(folder)
        if file is not None:
            network, size = _of_timm_folder(file)
            return Known(network, size, mean, std, str(file))
    return _of_architecture(name) if name else Known()


def names_its_network(weights: str) -> bool:
    """Whether they are a tag of timm with the model's name before it, such as resnet18.a1_in1k."""
    name, _, tag = weights.partition(".")
    return is_tag(weights) and bool(tag) and timm.is_model(name)


def _of_tag(name: str, tag: str) -> Known:
    try:
        published = timm.get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=False)
    except RuntimeError:  # no such tag or model: reported where the weights are looked up
        published = None
    if published is None or not published.architecture:
        return Known({"name": name}) if timm.is_model(name) else Known()
    return Known({"name": name}, published.input_size[-1], published.mean, published.std, f"timm's {name}.{tag}")


def _of_architecture(name: str) -> Known:
    """Mean and deviation that all of timm's weights of the architecture have."""
    published = [timm.get_pretrained_cfg(tagged) for tagged in timm.list_models(f"{name}.*", pretrained=True)]
    found = {(tuple(one.mean), tuple(one.std)) for one in published if one is not None}
    if len(found) != 1:
        return Known()
    mean, std = found.pop()
    return Known(mean=mean, std=std, of=f"timm's {name}")


def _of_model(folder: Path) -> tuple[Sequence[float] | None, Sequence[float] | None, Path | None]:
    """Mean and deviation of a Hugging Face model, of timm or of transformers, and the file with them."""
    for name, section, keys in (
        ("config.json", "pretrained_cfg", ("mean", "std")),
        ("preprocessor_config.json", None, ("image_mean", "image_std")),
    ):
        file = folder / name
        try:
            about: Mapping[str, Any] = json.loads(file.read_bytes())
            mean, std = ((about[section] if section else about)[key] for key in keys)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all(isinstance(values, list) and len(values) == 3 for values in (mean, std)):
            return mean, std, file
    return None, None, None


def _of_timm_folder(config: Path) -> tuple[dict[str, object] | None, int | None]:
    """The architecture and the image size that the config.json of a timm model names, if it is one."""
    about = json.loads(config.read_bytes())
    name, published, arguments = (about.get(key) for key in ("architecture", "pretrained_cfg", "model_args"))
    if not isinstance(name, str) or not timm.is_model(name) or not isinstance(published, dict):
        return None, None
    size = published.get("input_size")
    own = {key: value for key, value in (arguments or {}).items() if key not in RESERVED_ARGUMENTS}
    return {"name": name, "arguments": own}, size[-1] if isinstance(size, list) else None


def normalised(mean: Sequence[float], std: Sequence[float], of: str) -> str:
    """The sentence that says how images are normalised, and who says so."""
    means, stds = (", ".join(f"{value:g}" for value in values) for values in (mean, std))
    return f"images are normalised with mean {means}, std {stds} of {of}"

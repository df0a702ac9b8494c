"""A folder that timm reads (`local-dir:FOLDER`), and transformers through its wrapper of timm models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from ssl_pipeline.augment.central_crop import CROP_RATIO, LARGEST_UNCUT_SIZE
from ssl_pipeline.backbones import BackboneOfRun
from ssl_pipeline.config import ConfigError, RunError
from ssl_pipeline.eval.exports.comparison import example_images, expected_features, quiet, require_same
from ssl_pipeline.eval.exports.plain import arguments_of, plain_model
from ssl_pipeline.files import JSON, write_json, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FROM_TIMM = ("first_conv", "pool_size", "fixed_input_size")  # facts of the architecture


def require_timm(found: BackboneOfRun) -> None:
    """Raises ConfigError for a network that timm cannot build on its own."""
    config = found.backbone.config
    if config.small_images:
        raise ConfigError(
            f"'{config.name}' with small_images has a stem that timm cannot build. format=onnx works, and "
            "format=backbone with ssl_pipeline.load."
        )
    if timm.model_entrypoint(config.name).__module__.startswith("ssl_pipeline."):
        raise ConfigError(
            f"'{config.name}' is this library's own network, which timm does not have. format=onnx works, and "
            "format=backbone with ssl_pipeline.load."
        )


def write_folder(folder: Path, found: BackboneOfRun, *, for_transformers: bool) -> None:
    """`config.json` and `model.safetensors` under timm's own names."""
    backbone, seen = found.backbone, found.preprocessing
    own = getattr(backbone.model, "default_cfg", {})
    whole = seen.size <= LARGEST_UNCUT_SIZE
    pretrained: dict[str, JSON] = {
        "input_size": [3, seen.size, seen.size],
        "mean": list(seen.mean),
        "std": list(seen.std),
        "interpolation": seen.interpolation,
        "crop_pct": 1.0 if whole else round(1 / CROP_RATIO, 4),
        "crop_mode": "center",
        "num_classes": 0,
        **{key: own[key] for key in FROM_TIMM if own.get(key) is not None},
    }
    arguments: dict[str, JSON] = {key: value for key, value in arguments_of(found).items()}
    if getattr(getattr(backbone.model, "patch_embed", None), "strict_img_size", True) is False:
        arguments["dynamic_img_size"] = True
    description: dict[str, JSON] = {
        "architecture": backbone.config.name,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "pretrained_cfg": pretrained,
        "model_args": arguments,
    }
    if for_transformers:
        description |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_model(found).state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, state, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, description)


def compare_with_timm(folder: Path, found: BackboneOfRun) -> str:
    """Read the folder as timm does; returns what to say about it. Raises RunError if it is not the same network."""
    images = example_images(found.preprocessing.size)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            features = model(images)
    except Exception as error:  # whatever timm rejects
        raise RunError(f"timm {timm.__version__} does not read what was written: {error}. Update timm.") from error
    return _told("timm", require_same(features, expected_features(found, images), reader="timm"))


def compare_with_transformers(folder: Path, found: BackboneOfRun) -> Iterator[str]:
    """The same with transformers, where it is installed."""
    try:
        from transformers import AutoModel
    except ImportError:
        yield "not read again with transformers, which is not installed: pip install 'ssl-pipeline[huggingface]'"
        return
    images = example_images(found.preprocessing.size)
    try:
        with quiet():
            model = AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            features = model(images).pooler_output
    except Exception as error:
        raise RunError(f"transformers does not read what was written: {error}. Update transformers.") from error
    yield _told("transformers", require_same(features, expected_features(found, images), reader="transformers"))


def _told(reader: str, difference: float) -> str:
    return f"read again with {reader}: features differ by at most {difference:.1g}"

"""A finished backbone's directory: backbone.json and backbone.safetensors, which timm can read on its own."""

from __future__ import annotations

import json
from pathlib import Path

from ssl_pipeline.backbones.config import ARCHITECTURE, BackboneConfig, architecture_of
from ssl_pipeline.backbones.create import create_backbone
from ssl_pipeline.backbones.networks import Backbone
from ssl_pipeline.backbones.preprocessing import Preprocessing
from ssl_pipeline.backbones.weights import first_line, load_source
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.files import JSON, write_json, write_tensors


def save_backbone(
    directory: Path, backbone: Backbone, preprocessing: Preprocessing, *, step: int | None = None
) -> None:
    """Write backbone.json and backbone.safetensors, for timm.create_model(name, num_classes=0, **arguments).

    timm has no reversible ViT and refuses its tensors; `load_backbone` makes it again.
    `step` is the number of optimizer steps that made it (`exported_step`). Nothing describes tensors of another step:
    the old description is removed first.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    description: dict[str, JSON] = {
        **backbone.config.model_dump(mode="json", include=set(ARCHITECTURE)),
        "size": preprocessing.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        **({} if step is None else {"step": step}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "backbone.json").unlink(missing_ok=True)
    write_tensors(directory / "backbone.safetensors", state, metadata={"format": "pt"})
    write_json(directory / "backbone.json", description)


def load_backbone(directory: Path) -> tuple[Backbone, Preprocessing]:
    """The backbone that `save_backbone` wrote into a directory, and what it expects of images."""
    path = directory / "backbone.json"
    try:
        description = json.loads(path.read_bytes())
        config = validate(BackboneConfig, architecture_of(description))
        preprocessing = Preprocessing(description["size"], tuple(description["mean"]), tuple(description["std"]))
    except FileNotFoundError:
        raise ConfigError(f"{directory} holds no backbone.json: is it the directory of a finished run?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not describe a backbone ({first_line(error)}).") from error
    backbone = create_backbone(config)
    backbone.origin = load_source(backbone.model, str(directory / "backbone.safetensors"), network=None)
    backbone.preprocessing = preprocessing
    return backbone, preprocessing

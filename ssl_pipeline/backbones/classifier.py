"""A linear classifier on a backbone's features, in one file next to the backbone's: classifier.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssl_pipeline.backbones.exported import takes_export
from ssl_pipeline.backbones.weights import find_in_run, require_floats, tensors_of
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import write_tensors

FILE_NAME = "classifier.safetensors"
HEAD_NORM_EPS = 1e-6  # MAE's main_linprobe.py


class NormalisedLinear(nn.Linear):
    """A linear classifier on features (B, D) that batch norm without parameters has put on one scale (MAE's probe)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=HEAD_NORM_EPS)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.norm(features))


def plain_linear(tensors: Mapping[str, Tensor]) -> nn.Linear:
    """The linear layer that gives what a classifier with these tensors gives in evaluation mode.

    Batch norm of a NormalisedLinear goes into it: weight / sqrt(var + eps), bias - weight @ mean / sqrt(var + eps).
    """
    weight, bias = tensors["weight"].detach().cpu(), tensors.get("bias")
    bias = None if bias is None else bias.detach().cpu()
    if "norm.running_mean" in tensors:
        mean, var = (tensors[f"norm.running_{name}"].detach().cpu() for name in ("mean", "var"))
        weight = weight / (var + HEAD_NORM_EPS).sqrt()
        bias = (0 if bias is None else bias) - weight @ mean
    num_classes, dim = weight.shape
    classifier = nn.Linear(dim, num_classes, bias=bias is not None)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        if bias is not None:
            classifier.bias.copy_(bias)
    return classifier


def save_classifier(directory: Path, classifier: nn.Linear, class_names: Sequence[str] | None) -> None:
    """Write `weight` (C, D) and `bias` (C,); the names of the classes, if known, go into the file's header as JSON."""
    plain = plain_linear(classifier.state_dict())
    state = {name: tensor.detach().contiguous() for name, tensor in plain.state_dict().items()}
    header = {"format": "pt"}
    if class_names is not None:
        header["class_names"] = json.dumps(list(class_names))
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / FILE_NAME, state, metadata=header)


def load_classifier(directory: Path) -> tuple[nn.Linear, tuple[str, ...] | None]:
    """The classifier that `save_classifier` wrote into a directory, and the names of its classes if it has them."""
    path = directory / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            names = json.loads((file.metadata() or {}).get("class_names", "null"))
        num_classes, dim = state["weight"].shape
        classifier = nn.Linear(dim, num_classes, bias="bias" in state)
        classifier.load_state_dict(state)
    except FileNotFoundError:
        raise ConfigError(f"{directory} holds no {FILE_NAME}: the run's method does not train a classifier.") from None
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a linear classifier ({str(error).splitlines()[0]}).") from None
    require_floats(state.items(), source=str(path))
    return classifier, tuple(names) if names is not None else None


def classifier_of_run(run: Path, *, step: int | None = None) -> tuple[nn.Linear, tuple[str, ...] | None]:
    """The classifier that belongs to the backbone `load_run` gives for the same step, exported or in a checkpoint.

    Raises ConfigError if the run's method learnt none.
    """
    if takes_export(run, step=step):
        return load_classifier(run)
    checkpoint, _, _ = find_in_run(run, step=step)
    saved = checkpoint.state.classifier
    if saved is None:
        raise ConfigError(f"{checkpoint.path} holds no classifier: the run's method does not train one.")
    return plain_linear(tensors_of(checkpoint, saved.prefix)), saved.class_names

"""All tensors of a network from a table of tensors, or an error that lists what does not fit, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from ssl_pipeline.backbones.reversible import MARK
from ssl_pipeline.backbones.small_stem import SIDE, shrink_stem, takes_small_stem
from ssl_pipeline.backbones.weights.fitting import fit
from ssl_pipeline.backbones.weights.layouts import ARCHITECTURES
from ssl_pipeline.backbones.weights.matching import Match, count_parts, find_network, part_of
from ssl_pipeline.backbones.weights.values import require_floats
from ssl_pipeline.config import ConfigError

SHOWN = 3  # names in an error
USUAL_STEM, SMALL_STEM = (64, 3, 7, 7), (64, 3, SIDE, SIDE)  # of ResNets


@dataclass(frozen=True)
class Taken:
    """How many of a file's tensors went into the network, and what the others belong to."""

    num_taken: int
    num_tensors: int
    left: dict[str, int]

    def __str__(self) -> str:
        taken = f"took {self.num_taken} of {self.num_tensors} tensors"
        left = ", ".join(f"{count} of the {part}" for part, count in self.left.items())
        return f"{taken}; left: {left}" if left else taken


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str, network: str | None = None) -> Taken:
    """Fill every tensor of a timm network from `tensors`, whatever layout of `layouts` their names follow.

    source: names the file in errors. network: "teacher" or "student", where there are both; by default the one that the
    method's authors evaluate. A position table of another size is resampled. What is left must be a known other part (a
    head, a decoder, ...), and what is taken must be finite floats, except for the network's counters. Raises
    ConfigError otherwise, with the network unchanged.
    """
    try:
        match = find_network(tensors, model, network=network)
    except LookupError as error:
        raise ConfigError(
            f"backbone.weights_from={network}: {source} holds no {network}, but a {error}. Leave weights_from out."
        ) from None
    own = model.state_dict()
    fitted = fit({name: tensors[original] for name, original in match.original_of.items()}, model, own)
    kept = {match.original_of[name] for name in fitted if name not in own and name in match.original_of}
    left = sorted(kept | (tensors.keys() - set(match.original_of.values())))
    unknown = [name for name in left if part_of(name, match.root) is None]
    unknown += [name for name in fitted if name not in own and name not in match.original_of]  # parts of what was split
    problems = _problems(fitted, own, unknown)
    if problems:
        hint = _hint(fitted, own) or _what_would_fit(tensors, own)
        raise ConfigError(f"{source} does not fit: {'; '.join(problems)}.{hint}")
    unused = set(left)
    require_floats(
        (
            (original, tensors[original])
            for name, original in match.original_of.items()
            if original not in unused and _is_weight(name, own)
        ),
        source=source,
    )
    model.load_state_dict({name: fitted[name] for name in own})
    return Taken(len(tensors) - len(left), len(tensors), count_parts(left, match.root))


def _is_weight(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor becomes one of the network's numbers, or a part of one; counters and masks do not."""
    if name in own:
        return own[name].is_floating_point()
    return not name.endswith("bias_mask")


def _problems(fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], unknown: list[str]) -> list[str]:
    missing = [name for name in own if name not in fitted]
    other = [name for name, value in own.items() if name in fitted and fitted[name].shape != value.shape]
    problems = [f"it {kind} {_some(names)}" for kind, names in (("misses", missing), ("has unknown", unknown)) if names]
    if other:
        needed, got = tuple(own[other[0]].shape), tuple(fitted[other[0]].shape)
        among = f", one of {len(other)} such tensors" if len(other) > 1 else ""
        problems.append(f"{other[0]} must be {needed}. Got {got}{among}")
    return problems


def _some(names: list[str]) -> str:
    return f"{', '.join(name[:80] for name in names[:SHOWN])} ({len(names)} in all)"


def _hint(fitted: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """For the one difference that a setting of the network fixes: a norm before pooling or after, two streams."""
    if {name for name in own if name not in fitted} == {MARK}:
        return " The file's ViT has one stream of tokens; reversible computes another function: set reversible=false."
    if MARK in fitted and MARK not in own:
        return " The file's ViT is reversible, which computes another function: set backbone.reversible=true."
    if {name for name in own if name not in fitted} == {"fc_norm.weight", "fc_norm.bias"} and "norm.weight" in fitted:
        return " The file's last norm comes before pooling: try backbone.arguments.global_pool=token."
    if {name for name in own if name not in fitted} == {"norm.weight", "norm.bias"} and "fc_norm.weight" in fitted:
        return " The file's last norm comes after pooling: try backbone.arguments.global_pool=avg."
    return ""


def _what_would_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The names of timm architectures that the file fills, by shapes alone; own: the network that was asked for."""
    shapes = {name: value.to("meta") for name, value in tensors.items()}
    first = {tuple(value.shape) for value in shapes.values()}
    asked_small = "conv1.weight" in own and own["conv1.weight"].shape[-1] == SIDE
    said = " with backbone.small_images=false" if asked_small else ""
    plain = {name for shape in first for name in ARCHITECTURES.get(shape, ())}
    fitting = {name for name in plain if timm.is_model(name) and _fits(name, shapes)}
    twins = {twin for name in fitting for twin in _twins(name) if timm.is_model(twin)} - fitting
    found = [f"{name}{said}" for name in sorted(fitting | {twin for twin in twins if _fits(twin, shapes)})]
    if SMALL_STEM in first:
        small = [name for name in ARCHITECTURES[USUAL_STEM] if _fits(name, shapes, small_stem=True)]
        found += [f"{name} with backbone.small_images=true" for name in small]
    if not found:
        return ""
    several = (
        " They have the same tensors, but may differ in padding, activations and the colours they expect: set the one "
        "that the weights belong to."
    )
    return f" It fits {', '.join(found)}.{several if len(found) > 1 else ''}"


def _twins(name: str) -> list[str]:
    """timm's names of networks with the same tensors: TensorFlow's pad differently, DeiT's expect other colours."""
    rest = name.removeprefix("tf_")
    return [rest, f"tf_{rest}", *([f"deit_{rest[4:]}"] if rest.startswith("vit_") else [])]


def _fits(name: str, shapes: Mapping[str, Tensor], *, small_stem: bool = False) -> bool:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        if small_stem and not takes_small_stem(model):
            return False
        if small_stem:
            shrink_stem(model)
    match: Match = find_network(shapes, model, network=None)
    own = model.state_dict()
    if match.filled < len(own):
        return False
    fitted = fit({ours: shapes[original] for ours, original in match.original_of.items()}, model, own)
    left = (match.original_of.get(name) for name in fitted if name not in own)
    return all(name is not None and part_of(name, match.root) for name in left)

"""What a command's starting weights say about the run: their network, its size and colours, as arguments."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import timm
import torch

from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone
from ssl_pipeline.backbones.known import Known, known_of, normalised
from ssl_pipeline.backbones.networks import TokenBackbone, batch_norms
from ssl_pipeline.backbones.weights import is_tag, require_place
from ssl_pipeline.config import ConfigError, Tree, nearest, validate
from ssl_pipeline.config.printing import note

OF_FEATURES = ("class_tokens", "patch_mean")  # how a recipe reads a ViT, whatever run the weights are of
KEPT = ("drop_path", "drop_path_kind", "frozen_batch_norm")


@dataclass(frozen=True)
class StartingWeights:
    """Weights as `backbone.weights` takes them, what is known of them, and the other arguments."""

    weights: str
    known: Known
    given: Mapping[str, str]

    @cached_property
    def network(self) -> Backbone:
        """The network without its values; ConfigError if neither the weights nor the arguments name it."""
        network, name = self.known.network, self.given.get("backbone.name")
        if name is not None and (network is None or network["name"] != name):
            network = {"name": name}
        if network is None:
            model, _, tag = self.weights.partition(".")
            like = nearest(model, timm.list_models()) if tag and is_tag(self.weights) else ""
            if like:
                raise ConfigError(f"No timm model '{model}'for the weights {self.weights}.{like}")
            raise ConfigError(
                f"It is not known which network the weights {self.weights} belong to. Set backbone.name=MODEL, a timm "
                "model; a run and a full name such as resnet18.a1_in1k include it."
            )
        with torch.device("meta"):
            return create_backbone(
                validate(BackboneConfig, {key: json.loads(json.dumps(network[key])) for key in network})
            )

    def arguments(self, recipe: Tree, *, size_key: str | None = None) -> dict[str, str]:
        """Network and colours as arguments over those of the recipe, without what is given.

        size_key: where the size of the images goes, if it is set too.
        """
        told: dict[str, object] = {}
        if self.known.network is not None and "backbone.name" not in self.given:
            told |= {f"backbone.{key}": value for key, value in self.known.network.items()}
        if self.known.network is not None:  # for other files the settings of a run find the colours
            told |= {"data.mean": self.known.mean, "data.std": self.known.std}
            told |= {} if size_key is None else {size_key: self.known.size}
        if "backbone.name" in told:
            told |= self._kept(recipe)
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in told.items()
            if value is not None and not any(one == key or one.startswith(f"{key}.") for one in self.given)
        }

    def note_colours(self, arguments: Collection[str]) -> None:
        """Say whose mean and deviation it is, if they are among the keys of `arguments`."""
        if self.known.mean is not None and self.known.std is not None and {"data.mean", "data.std"} <= set(arguments):
            note(f"{normalised(self.known.mean, self.known.std, self.known.of)}.")

    def _kept(self, recipe: Tree) -> dict[str, object]:
        """What the recipe says of any backbone, for the one of the weights, whose name would drop it."""
        section = recipe.get("backbone")
        kept: dict[str, object] = (
            {f"backbone.{key}": section[key] for key in KEPT if key in section} if isinstance(section, dict) else {}
        )
        if not batch_norms(self.network):
            kept.pop("backbone.frozen_batch_norm", None)
        if isinstance(section, dict) and self._takes_class_tokens(section.get("class_tokens")):
            kept |= {f"backbone.{key}": section[key] for key in OF_FEATURES if key in section}
        return kept

    def _takes_class_tokens(self, blocks: object) -> bool:
        """Whether features of so many blocks can be had of a network whose features are its own."""
        network = self.network
        if not isinstance(network, TokenBackbone) or getattr(network.model, "cls_token", None) is None:
            return False
        return not network.class_tokens and isinstance(blocks, int) and 0 < blocks <= network.num_blocks


def starting_weights(weights: str, given: Mapping[str, str], *, key: str = "backbone.weights") -> StartingWeights:
    """What is known of the weights that `key` names; ConfigError for a file or a run that is not there."""
    if not is_tag(weights):
        require_place(weights, key=key)
    known = known_of(weights, name=given.get("backbone.name"), which=given.get("backbone.weights_from"))
    return StartingWeights(weights, known, given)

"""The recipe of a run on `images=`: the one that is named, that the run has already, or that suits the images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ssl_pipeline.backbones import Backbone, TokenBackbone
from ssl_pipeline.backbones.known import names_its_network
from ssl_pipeline.commands.first_look import Look, largest_view, reduced_side
from ssl_pipeline.commands.known_weights import StartingWeights, starting_weights
from ssl_pipeline.config import RECIPES, Tree, launched_processes, read_recipe, read_yaml
from ssl_pipeline.config.arguments import keys_of

AUTO = "auto"
TINY = 48  # pixels: below it a network for photographs halves its images away
SMALL = 96  # pixels: the views of dinov2_small
SOME, MANY = 20_000, 100_000  # images that a tiny ViT and a ViT-S from scratch need at least


class RecipeChoice:
    """What a run has of its recipe and of the weights that it begins with, as arguments under those that are given."""

    def __init__(self, recipe: str, output: Path, given: Mapping[str, str]) -> None:
        self.recipe, self.output, self.given = recipe, output, given
        self.has_begun = (output / "config.yaml").exists()

    @cached_property
    def weights(self) -> StartingWeights | None:
        """Those that it begins with, where they are to say what network it has."""
        weights = self.given.get("backbone.weights", "null")
        if weights in ("null", "") or (self.recipe != AUTO and not names_its_network(weights)):
            return None
        return starting_weights(weights, self.given)

    @property
    def is_free(self) -> bool:
        """Whether the images choose."""
        return self.recipe == AUTO and not self._of_the_run

    @property
    def settings(self) -> Tree:
        """Those of a recipe that is named, else none."""
        return {} if self.recipe == AUTO else read_recipe(self.recipe, RECIPES)

    @property
    def images(self) -> str | None:
        """The `images=` that the run was begun with; None without any."""
        images = self._settings_of_the_run.get("images")
        return images if isinstance(images, str) else None

    @cached_property
    def _of_the_run(self) -> list[str]:
        """The recipe that the run has, as arguments; none if it has not begun."""
        tree = self._settings_of_the_run
        if isinstance(tree.get("recipe"), str):
            return [f"recipe={tree['recipe']}", *(["knn=null"] if tree.get("knn") is None else [])]
        return []

    @cached_property
    def _settings_of_the_run(self) -> Tree:
        if not self.has_begun:
            return {}
        path = self.output / "config.yaml"
        tree = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
        return tree if isinstance(tree, dict) else {}

    def arguments(self, look: Look) -> list[str]:
        """`recipe=`, and what images and weights add to it, without what is given."""
        own, _ = self._suggested(look)
        return without_keys([*own, *self._of_weights(own)], self.given)

    def why(self, look: Look) -> str:
        """What was chosen, and why, for the user."""
        own, why = self._suggested(look)
        return f"{' '.join(own)}: {why}"

    def short_side(self, look: Look) -> tuple[int | None, str]:
        """Pixels to which large photographs are reduced as they are packed, and what to say of it."""
        recipe = keys_of(self._suggested(look)[0])["recipe"]
        view = largest_view(read_recipe(recipe, RECIPES), self.given)
        short_side = reduced_side(look.side, view)
        return short_side, (
            f"images of {look.side:,} pixels (median of the shorter sides) are packed as JPEG of {short_side} pixels "
            f"at most: {recipe} has views of {view}. data.shards=SHARDS of make_shards keeps them as they are."
        )

    def note_colours(self, arguments: Sequence[str]) -> None:
        """Say whose mean and deviation the arguments have."""
        if self.weights is not None:
            self.weights.note_colours(keys_of(arguments))

    def _suggested(self, look: Look) -> tuple[list[str], str]:
        if self.recipe != AUTO:
            return [f"recipe={self.recipe}"], "as it is named"
        network = None if self.weights is None else self.weights.network
        own, why = (
            (self._of_the_run, "as the run has it")
            if self._of_the_run
            else choose_recipe(look, network, has_gpu=torch.cuda.is_available())
        )
        return [*own, *fitting_batch(own, look.count)], why

    def _of_weights(self, own: Sequence[str]) -> list[str]:
        if self.weights is None:
            return []
        told = self.weights.arguments(read_recipe(keys_of(own)["recipe"], RECIPES))
        return [f"{key}={text}" for key, text in told.items()]


def choose_recipe(look: Look, network: Backbone | None, *, has_gpu: bool) -> tuple[list[str], str]:
    """The arguments that a first look suggests, `recipe=` among them, and why.

    network: that of the weights that the run begins with, if it does.
    """
    found = f"{look.count:,} images of {look.side} pixels (median of the shorter sides)"
    if network is not None:
        name = network.config.name
        family = next((kind for kind in ("DINOv2", "DINOv3") if kind.lower() in name), "")
        kind = family or ("ViT" if isinstance(network, TokenBackbone) else "CNN")
        return [f"recipe=continue_{kind.lower()}_small"], f"{found}, and weights of a {kind} ({name}) to continue from"
    if look.side < TINY:
        return ["recipe=cifar10_simclr_resnet18", "knn=null"], f"{found}: a network that keeps small images whole"
    if has_gpu and look.count >= MANY:
        return ["recipe=dino_vits16", "knn=null"], f"{found} and a GPU: enough for a ViT from scratch"
    if has_gpu and look.count >= SOME and look.side >= SMALL:
        return ["recipe=dinov2_small"], f"{found} and a GPU: a tiny ViT from scratch"
    return ["recipe=photos_small"], f"{found}{'' if has_gpu else ' and no GPU'}: a small network from scratch"


def fitting_batch(arguments: Sequence[str], count: int) -> list[str]:
    """The batch size for fewer images than a step of the recipe takes: a power of 2; none for more."""
    data = read_recipe(keys_of(arguments)["recipe"], RECIPES).get("data")
    batch = data.get("batch_size") if isinstance(data, dict) else None
    processes = launched_processes()
    if not isinstance(batch, int) or count >= batch * processes:
        return []
    return [f"data.batch_size={2 ** int(np.log2(max(count // processes, 1)))}"]


def without_keys(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """The arguments for whose keys nobody has given a value; `recipe` is among them whatever was given (auto)."""
    return [argument for argument in arguments if argument.partition("=")[0] not in keys or argument[:7] == "recipe="]

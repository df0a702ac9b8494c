"""Fine-tune a backbone: `python finetune.py weights=RUN train=SHARDS test=SHARDS [key=value ...]`.

It is `pretrain.py` with the method `supervised`: `weights`, `train` and `test` set keys of a run, and what the weights
belong to (network, size, colours) is read from where they come from. At the end the classifier is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.backbones.weights import is_tag
from ssl_pipeline.commands.before_packing import check_before_packing, check_outline
from ssl_pipeline.commands.finetune import OWN_KEYS
from ssl_pipeline.commands.known_weights import StartingWeights, starting_weights
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import (
    RECIPES,
    ConfigError,
    launched_rank,
    printable,
    read_recipe,
    refuse,
    run_command,
    without_flags,
)
from ssl_pipeline.config.arguments import keys_of
from ssl_pipeline.eval.classifier import ClassifierConfig
from ssl_pipeline.eval.classifier import main as measure
from ssl_pipeline.packing.images_as_shards import holds_images, packed, require_images
from ssl_pipeline.packing.packed_once import SHARDS, is_packed

OWN = (*OWN_KEYS, "recipe", "output")
STANDS_FOR = {"weights": "backbone.weights", "train": "data.shards", "test": "classifier.val"}
RECIPE_OF = {"vit": "finetune_vit_small", "cnn": "finetune_cnn_small"}
MEASURED_EVERY = "10%"


class FinetuneConfig(PretrainConfig):
    """Fine-tune a backbone on labelled images: weights=RUN|FILE|TAG train=SHARDS test=SHARDS, and the keys of a run."""


def expand(arguments: Sequence[str], *, packs: bool = True) -> list[str]:
    """Arguments with what `weights=`, `train=` and `test=` set, and the recipe that suits the weights.

    packs: whether folders of images are packed; otherwise nothing is written. Raises ConfigError for two keys that say
    the same, and for weights whose network is unknown.
    """
    given = keys_of(arguments)
    for own, key in STANDS_FOR.items():
        if own in given and key in given:
            raise ConfigError(f"{own}= stands for {key}=. Give one of the two.")
    if not given.keys() & {"weights", "backbone.weights", "recipe"}:
        raise ConfigError("weights= is missing. Set weights=RUN, FILE or TAG, or recipe=NAME with weights of its own.")
    if not given.keys() & {"train", "data.shards", "recipe"}:
        raise ConfigError("train= is missing. Set train=FOLDER, ZIP or SHARDS, the images with labels.")
    key = "weights" if "weights" in given else "backbone.weights"
    weights = None if key not in given else starting_weights(given[key], given, key=key)
    recipe = given.get("recipe") or _recipe_for(weights)
    tree = read_recipe(recipe, RECIPES)
    told: dict[str, str] = {}
    if weights is not None:
        told = {"backbone.weights": weights.weights, **weights.arguments(tree, size_key="augment.view.size")}
        weights.note_colours(told)
    stem = _stem(weights)
    output = Path(given.get("output", Path("runs") / (f"{stem}_{Path(recipe).stem}" if stem else Path(recipe).stem)))
    places = {"train": output.expanduser(), "test": output.expanduser() / "test"}
    for own in given.keys() & places:
        told[STANDS_FOR[own]] = str(places[own] / SHARDS) if holds_images(given[own]) else given[own]
    if "test" in given and "classifier.every" not in given and not isinstance(tree.get("classifier"), dict):
        told["classifier.every"] = MEASURED_EVERY
    rest = [f"{key}={text}" for key, text in given.items() if key not in OWN and key not in told]
    full = [f"recipe={recipe}", *(f"{key}={text}" for key, text in told.items()), *rest, f"output={output}"]
    if packs:
        images = {own: given[own] for own in places if own in given and holds_images(given[own])}
        for own in [own for own in places if own in given and images]:  # reported before hours of packing
            require_images(given[own], key=own)
        _pack(images, places, full, has_begun=(output.expanduser() / "config.yaml").exists())
    return full


def _pack(images: Mapping[str, str], places: Mapping[str, Path], arguments: Sequence[str], *, has_begun: bool) -> None:
    """Make shards of folders and zips, once, and again until a run has begun; a wrong setting is reported first."""
    known = has_begun and all(is_packed(places[key]) for key in images)
    if images and launched_rank() == "0" and not known:
        check_before_packing(FinetuneConfig, arguments)
    for key, source in images.items():
        packed(source, places[key], key=key, renewed=not has_begun)


def _recipe_for(weights: StartingWeights | None) -> str:
    assert weights is not None  # or the recipe is given
    return RECIPE_OF["vit" if isinstance(weights.network, TokenBackbone) else "cnn"]


def _stem(weights: StartingWeights | None) -> str:
    """The run's name from the weights: a run by its directory, a file by its name, a tag by its network."""
    if weights is None:
        return ""
    if is_tag(weights.weights):
        return str(weights.known.network["name"]) if weights.known.network else weights.weights
    return Path(weights.weights).expanduser().resolve().stem


def finetune(config: FinetuneConfig) -> int:
    """Run the settings to the end and measure the classifier; returns the exit code as `pretrain` does."""
    if config.method.name != "supervised":
        raise ConfigError(
            f"finetune.py trains the method supervised. The recipe has {config.method.name}; use pretrain.py for it, "
            "or a recipe of recipes/finetune/."
        )
    code = pretrain(config)
    shown = None if config.find_lr else config.classifier
    if code == 0 and shown is not None and launched_rank() == "0":
        measure(
            ClassifierConfig(
                run=config.run_directory,
                test=shown.val,
                batch_size=shown.batch_size,
                interpolation=shown.interpolation,
                workers=config.data.workers,
            )
        )
    return code


def main(name: str) -> int:
    """The command line, called `name`, behind `commands/finetune.py`; returns the exit code."""
    arguments = sys.argv[1:]
    pairs, flags = without_flags(arguments)
    if not flags & {"--help", "-h"}:
        try:
            arguments = [*expand(pairs, packs="--print" not in flags), *flags]
        except Exception as error:
            if "--debug" in flags:
                raise
            return refuse(error, running=False)
        if launched_rank() == "0" and "--print" not in flags:
            print(printable(f"as: pretrain.py {' '.join(arguments)}"), flush=True)
    return run_command(
        FinetuneConfig, finetune, command=name, argv=arguments, recipes=RECIPES, check=check_outline, shared=True
    )

"""Fine-tune a backbone: `python finetune.py weights=RUN train=SHARDS test=SHARDS [key=value ...]`.

It is `pretrain.py` with the method `supervised`: `weights`, `train` and `test` stand for keys of a run, and what the
weights are of (network, size, colours) is read from where they come from. At the end the classifier is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ssl_pipeline.backbones import Backbone, BackboneConfig, TokenBackbone, create_backbone
from ssl_pipeline.backbones.known import Known, known_of, normalised
from ssl_pipeline.backbones.networks import batch_norms
from ssl_pipeline.backbones.weights import is_tag
from ssl_pipeline.commands.finetune import OWN_KEYS
from ssl_pipeline.commands.images import shards_of
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import (
    RECIPES,
    ConfigError,
    Tree,
    launched_rank,
    printable,
    read_recipe,
    refuse,
    run_command,
    validate,
    without_flags,
)
from ssl_pipeline.config.arguments import keys_of
from ssl_pipeline.config.printing import note
from ssl_pipeline.eval.classifier import ClassifierConfig
from ssl_pipeline.eval.classifier import main as measure

OWN = (*OWN_KEYS, "recipe", "output")
STANDS_FOR = {"weights": "backbone.weights", "train": "data.shards", "test": "classifier.val"}
RECIPE_OF = {"vit": "finetune_vit_small", "cnn": "finetune_cnn_small"}
MEASURED_EVERY = "10%"
KEPT = ("drop_path", "frozen_batch_norm")


class FinetuneConfig(PretrainConfig):
    """Fine-tune a backbone on labelled images: weights=RUN|FILE|TAG train=SHARDS test=SHARDS, and the keys of a run."""


def expand(arguments: Sequence[str]) -> list[str]:
    """Arguments with what `weights=`, `train=` and `test=` stand for, and the recipe that suits the weights.

    Raises ConfigError for two keys that say the same, and for weights of which nothing tells the network.
    """
    given = keys_of(arguments)
    for own, key in STANDS_FOR.items():
        if own in given and key in given:
            raise ConfigError(f"{own}= stands for {key}=. Give one of the two.")
    if not given.keys() & {"weights", "backbone.weights", "recipe"}:
        raise ConfigError("weights= is missing. Set weights=RUN, FILE or TAG, or recipe=NAME with weights of its own.")
    weights = given.get("weights", given.get("backbone.weights"))
    told: dict[str, str] = {}
    known = Known()
    if weights is not None:
        weights, known = _look_up(weights, given)
        told["backbone.weights"] = weights
    recipe = given.get("recipe") or _recipe_for(_network(known, given))
    tree = read_recipe(recipe, RECIPES)
    told |= _described(known, given)
    if known.mean is not None and known.std is not None and {"data.mean", "data.std"} <= told.keys():
        note(f"{normalised(known.mean, known.std, known.of)}.")
    if "backbone.name" in told:
        told |= _kept(tree, _network(known, given))
    stem = _stem(given.get("weights", given.get("backbone.weights")), known)
    output = Path(given.get("output", Path("runs") / (f"{stem}_{Path(recipe).stem}" if stem else Path(recipe).stem)))
    if "train" in given:
        told["data.shards"] = _shards(given["train"], output.expanduser())
    if "test" in given:
        told["classifier.val"] = _shards(given["test"], output.expanduser() / "test")
        if "classifier.every" not in given and not isinstance(tree.get("classifier"), dict):
            told["classifier.every"] = MEASURED_EVERY
    rest = [f"{key}={text}" for key, text in given.items() if key not in OWN and key not in told]
    return [f"recipe={recipe}", *(f"{key}={text}" for key, text in told.items()), *rest, f"output={output}"]


def _shards(source: str, place: Path) -> str:
    """Images as shards: a folder or zip of images is packed in `place`, once; all else is shards in any form."""
    path = Path(source).expanduser()
    return shards_of(source, place) if path.is_dir() or path.suffix == ".zip" else source


def _look_up(weights: str, given: Mapping[str, str]) -> tuple[str, Known]:
    """The weights as `backbone.weights` takes them, and what is known of them."""
    name, _, tag = weights.partition(".")
    which = given.get("backbone.weights_from")
    if not is_tag(weights) or not tag:
        return weights, known_of(weights, name=given.get("backbone.name"), which=which)
    known = known_of(tag, name=name)
    return (weights, known) if known.network is None else (tag, known)


def _network(known: Known, given: Mapping[str, str]) -> Backbone:
    """The network without its values; ConfigError if neither the weights nor the arguments name it."""
    network = known.network
    if "backbone.name" in given:
        same = network is not None and network["name"] == given["backbone.name"]
        network = network if same else {"name": given["backbone.name"]}
    if network is None:
        raise ConfigError(
            "Nothing says which network the weights are of. Set backbone.name=MODEL, a timm model; a run and a full "
            "name such as resnet18.a1_in1k bring it along."
        )
    with torch.device("meta"):
        return create_backbone(validate(BackboneConfig, {key: json.loads(json.dumps(network[key])) for key in network}))


def _recipe_for(network: Backbone) -> str:
    return RECIPE_OF["vit" if isinstance(network, TokenBackbone) else "cnn"]


def _described(known: Known, given: Mapping[str, str]) -> dict[str, str]:
    """Network, size and colours of the weights as arguments, without those that are given."""
    told: dict[str, object] = {}
    if known.network is not None and "backbone.name" not in given:
        told |= {f"backbone.{key}": value for key, value in known.network.items()}
    if known.network is not None:  # the colours of a file are for the settings of a run to find
        told |= {"augment.view.size": known.size, "data.mean": known.mean, "data.std": known.std}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in told.items()
        if value is not None and not any(one == key or one.startswith(f"{key}.") for one in given)
    }


def _kept(recipe: Tree, network: Backbone) -> dict[str, str]:
    """What the recipe says of any backbone, for the one of the weights, whose name would drop it."""
    section = recipe.get("backbone")
    kept = {key: section[key] for key in KEPT if key in section} if isinstance(section, dict) else {}
    if not batch_norms(network):
        kept.pop("frozen_batch_norm", None)
    return {f"backbone.{key}": json.dumps(value) for key, value in kept.items()}


def _stem(weights: str | None, known: Known) -> str:
    """What the run is called by the weights: a run by its directory, a file by its name, a tag by its network."""
    if weights is None:
        return ""
    if is_tag(weights):
        return str(known.network["name"]) if known.network else weights
    return Path(weights).expanduser().resolve().stem


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
            arguments = [*expand(pairs), *flags]
        except Exception as error:
            if "--debug" in flags:
                raise
            return refuse(error, running=False)
        if launched_rank() == "0" and "--print" not in flags:
            print(printable(f"as: pretrain.py {' '.join(arguments)}"), flush=True)
    return run_command(FinetuneConfig, finetune, command=name, argv=arguments, recipes=RECIPES)

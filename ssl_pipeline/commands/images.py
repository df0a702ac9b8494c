"""`images=FOLDER` and `recipe=auto`: what they stand for, as the arguments that pretraining knows.

The folder (or zip) is packed into shards in the run's directory by the first process, once; the recipe is chosen by
what is in them and by the machine. Both are decided at the first start and found again by every later one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ssl_pipeline.config import ConfigError, printable, read_yaml
from ssl_pipeline.config.arguments import keys_of
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data_tools.packed_once import IN_A_RUN, is_packed, pack_once

AUTO = "auto"
SECONDS_BETWEEN_LOOKS = 0.5
TINY = 48  # pixels: below it a network for photographs halves its images away
MANY = 100_000  # images that a ViT from scratch needs at least


def expand(arguments: Sequence[str]) -> list[str]:
    """`key=value` arguments with what `images=` and `recipe=auto` stand for; without these, as they are.

    Packs the images in the first process, in which all others wait. Raises ConfigError or DataError.
    """
    given = keys_of(arguments)
    if "images" in given and "data.shards" in given:
        raise ConfigError("images= packs a folder into shards and data.shards= names some. Give one of the two.")
    rest = [argument for argument in arguments if argument.partition("=")[0] != "recipe"]
    images, recipe = given.get("images"), given.get("recipe", "")
    if images is None and recipe != AUTO:
        return list(arguments)
    if images is None and "data.shards" not in given:
        raise ConfigError("recipe=auto looks at the images to choose. Set images=FOLDER, or data.shards=SHARDS.")
    recipe = recipe or AUTO
    output = Path(given["output"] if "output" in given else _directory(images, given, recipe)).expanduser()
    shards = given["data.shards"] if images is None else shards_of(images, output)
    chosen = _chosen(open_shards(shards), given, output) if recipe == AUTO else [f"recipe={recipe}"]
    packed = [] if images is None else [f"data.shards={shards}"]
    return [*chosen, *rest, *packed, *([] if "output" in given else [f"output={output}"])]


def choose_recipe(index: ShardIndex, given: Mapping[str, str], *, has_gpu: bool) -> tuple[list[str], str]:
    """The arguments that a first look suggests, `recipe=` among them, and why."""
    side = int(np.median(index.sizes().min(axis=1)))
    found = f"{len(index):,} images of {side} pixels (median of the shorter sides)"
    if given.get("backbone.weights", "null") not in ("null", ""):
        is_vit = given.get("backbone.name", "").startswith(("vit_", "deit", "eva", "beit"))
        kind = "ViT" if is_vit else "CNN"
        return [f"recipe=continue_{kind.lower()}_small"], f"{found}, and weights of a {kind} to go on from"
    if side < TINY:
        return ["recipe=cifar10_simclr_resnet18", "knn=null"], f"{found}: a network that keeps small images whole"
    if has_gpu and len(index) >= MANY:
        return ["recipe=dino_vits16", "knn=null"], f"{found} and a GPU: enough for a ViT from scratch"
    return ["recipe=photos_small"], f"{found}{'' if has_gpu else ' and no GPU'}: a small network from scratch"


def _directory(images: str | None, given: Mapping[str, str], recipe: str) -> Path:
    name = Path(images or given["data.shards"]).expanduser().resolve().stem if recipe == AUTO else Path(recipe).stem
    return Path("runs") / (name or "images")


def shards_of(images: str, output: Path, *, way_out: str = IN_A_RUN) -> str:
    """Where the images are as shards: themselves, if they are some, or what is made of them, once, in `output`.

    The first process packs them, and the others wait for it. way_out: what to do where they have changed since then.
    """
    source = Path(images).expanduser()
    if images.endswith(".tar") or (source.is_dir() and any(source.glob("*.tar"))):
        return images
    if os.environ.get("RANK", "0") == "0":
        return str(pack_once(images if images == "digits" else str(source), output, way_out=way_out))
    while not is_packed(output):
        time.sleep(SECONDS_BETWEEN_LOOKS)  # if the first process fails, the launcher ends this one
    return str(pack_once(images if images == "digits" else str(source), output, way_out=way_out))


def _chosen(index: ShardIndex, given: Mapping[str, str], output: Path) -> list[str]:
    """The recipe that the run in `output` has, or the one that suits the images; rank 0 says which."""
    settings = output / "config.yaml"
    if settings.exists():
        tree = read_yaml(settings.read_text(encoding="utf-8"), where=str(settings))
        if isinstance(tree, dict) and isinstance(tree.get("recipe"), str):
            return [f"recipe={tree['recipe']}", *(["knn=null"] if tree.get("knn") is None else [])]
    arguments, why = choose_recipe(index, given, has_gpu=torch.cuda.is_available())
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"{' '.join(arguments)}: {why}. recipe=NAME chooses another."), flush=True)
    return arguments

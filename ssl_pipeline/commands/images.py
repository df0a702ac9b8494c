"""`images=FOLDER` and `recipe=auto`: what they stand for, as the arguments that pretraining knows.

The folder (or zip) is packed into shards in the run's directory by the first process, once; the recipe is chosen by
what is in them and by the machine. Both are decided at the first start and found again by every later one.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch

from ssl_pipeline.commands.trial import expected_time
from ssl_pipeline.config import (
    RECIPES,
    Config,
    ConfigError,
    Tree,
    Value,
    launched_rank,
    load,
    printable,
    read_recipe,
    read_yaml,
)
from ssl_pipeline.config.arguments import keys_of
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data_tools.packed_once import IN_A_RUN, is_packed, look_at, pack_once
from ssl_pipeline.data_tools.sources import Source
from ssl_pipeline.data_tools.sources import open_source as open_files

AUTO, DIGITS = "auto", "digits"
SECONDS_BETWEEN_LOOKS = 0.5
TINY = 48  # pixels: below it a network for photographs halves its images away
SMALL = 96  # pixels: the views of dinov2_small
SOME, MANY = 2_000, 100_000  # images that a tiny ViT and a ViT-S from scratch need at least
SMALLEST_PACKED = 256  # pixels of the shorter side
WATCHED, WATCHED_K, WATCHED_EVERY = 2000, 20, "20%"  # images of a labelled folder, and how k-NN watches them
ROOM = 2  # packed images are at least so many times the largest view, and worth it from so many times that


def expand(
    arguments: Sequence[str], overrides: Mapping[str, Value] | None = None, *, timed: type[Config] | None = None
) -> list[str]:
    """`key=value` arguments with what `images=` and `recipe=auto` stand for; without these, as they are.

    overrides: values by dotted keys that the run will have too. timed: the settings of a run, if a choice is to come
    with its expected time, for which a part of it is run by the first process alone; never if train.steps is given.
    Packs the images in the first process, in which all others wait. Raises ConfigError or DataError.
    """
    overrides = overrides or {}
    given = keys_of(arguments) | {key: str(value) for key, value in leaves(overrides) if value is not None}
    if given.get("images") == "":
        raise ConfigError("images= is empty. Set it to a folder or a zip of images.")
    if given.get("images", "").startswith("[") and not Path(given["images"]).exists():
        raise ConfigError(
            f"images= takes one folder or zip. Got the list {given['images']}. Put them into one folder (links will "
            "do), or make shards of each and set data.shards=[A,B]."
        )
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

    def short_side(files: Source) -> int | None:
        if timed is not None:  # a wrong setting is told before images are packed
            looked = choose_recipe(*look_at(files), given, has_gpu=torch.cuda.is_available())[0]
            own = _but(looked, given) if recipe == AUTO else [f"recipe={recipe}"]
            with redirect_stderr(io.StringIO()):  # what the reading notes is told when the run reads them
                load(timed, [*own, *rest, "data.shards=."], recipes=RECIPES, overrides=overrides)
        return _short_side(files, recipe, given)

    shards = given["data.shards"] if images is None else shards_of(images, output, short_side=short_side)
    packed = [] if images is None else [f"data.shards={shards}"]
    after = [*rest, *packed, *([] if "output" in given else [f"output={output}"])]
    if recipe != AUTO:
        watched = [] if _says(given, "knn") else watch(open_shards(shards), shards, given, read_recipe(recipe, RECIPES))
        return [f"recipe={recipe}", *watched, *after]
    index = open_shards(shards)
    if known := _recipe_of(output):
        watched = [] if images is None else watch(index, shards, given, {})
        known += fitting_batch(known, len(index))
        return [*_but(known, given.keys() | keys_of(watched).keys()), *watched, *after]
    side = int(np.median(index.sizes().min(axis=1)))
    chosen, why = choose_recipe(len(index), side, given, has_gpu=torch.cuda.is_available())
    chosen += fitting_batch(chosen, len(index))
    if launched_rank() == "0":
        expected = ""
        if timed is not None and given.get("train.steps", "null") == "null":
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            run = [*_but(chosen, given), *after]
            expected = expected_time(timed, run, overrides, num_images=len(index), num_processes=processes)
        line = f"{' '.join(chosen)}: {why}. {expected + '. ' if expected else ''}recipe=NAME chooses another."
        print(printable(line), flush=True)
    watched = [] if images is None else watch(index, shards, given, {})
    return [*_but(chosen, given.keys() | keys_of(watched).keys()), *watched, *after]


def _but(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """The arguments for whose keys nobody has given a value; `recipe` is among them whatever was given (auto)."""
    return [argument for argument in arguments if argument.partition("=")[0] not in keys or argument[:7] == "recipe="]


def fitting_batch(arguments: Sequence[str], count: int) -> list[str]:
    """The batch size for fewer images than a step of the recipe takes: a power of 2; none for more."""
    data = read_recipe(keys_of(arguments)["recipe"], RECIPES).get("data")
    batch = data.get("batch_size") if isinstance(data, dict) else None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not isinstance(batch, int) or count >= batch * processes:
        return []
    return [f"data.batch_size={2 ** int(np.log2(max(count // processes, 1)))}"]


def watch(index: ShardIndex, shards: str, given: Mapping[str, str], recipe: Tree) -> list[str]:
    """The argument by which a run on images= is measured on these images: by k-NN, if they have labels (class folders),
    else from weights by the spectrum; none if anything is given of it, or the recipe has images for it that are there.
    """
    if len(index) <= WATCHED_K or _says(given, "knn"):
        return []
    if index.label_problem() is None and len(np.unique(index.labels())) > 1:
        if _has_images(recipe.get("knn")):
            return []
        _say_first(
            f"The images have labels, so the run measures k-NN on up to {WATCHED:,} of them, each by all others, every "
            f"{WATCHED_EVERY}; it does not learn from them. knn=null leaves that out."
        )
        return [
            f"knn={{every: {WATCHED_EVERY}, train: {json.dumps(shards)}, val: null, images: {WATCHED}, k: {WATCHED_K}}}"
        ]
    if given.get("backbone.weights", "null") in ("null", "") or _says(given, "spectrum") or recipe.get("spectrum"):
        return []
    _say_first(
        f"The images have no labels, so the run watches RankMe of the features from the weights on, every "
        f"{WATCHED_EVERY}. spectrum=null leaves that out."
    )
    return [f"spectrum={{every: {WATCHED_EVERY}, images: {WATCHED // 2}}}"]


def _says(given: Mapping[str, str], section: str) -> bool:
    return any(key == section or key.startswith(f"{section}.") for key in given)


def _has_images(knn: object) -> bool:
    """Whether the training images of a recipe's k-NN are where it says."""
    return isinstance(knn, dict) and Path(str(knn.get("train"))).expanduser().exists()


def _say_first(words: str) -> None:
    if launched_rank() == "0":
        print(words, flush=True)


def leaves(tree: Mapping[str, Value], start: str = "") -> Iterator[tuple[str, Value]]:
    """Each value of nested sections by its dotted key."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def choose_recipe(count: int, side: int, given: Mapping[str, str], *, has_gpu: bool) -> tuple[list[str], str]:
    """The arguments that a first look suggests, `recipe=` among them, and why.

    count: of the images. side: the median of their shorter sides in pixels.
    """
    found = f"{count:,} images of {side} pixels (median of the shorter sides)"
    if given.get("backbone.weights", "null") not in ("null", ""):
        name = given.get("backbone.name", "")
        family = next((kind for kind in ("DINOv2", "DINOv3") if kind.lower() in name), "")
        kind = family or ("ViT" if name.startswith(("vit_", "deit", "eva", "beit")) else "CNN")
        return [f"recipe=continue_{kind.lower()}_small"], f"{found}, and weights of a {kind} to go on from"
    if side < TINY:
        return ["recipe=cifar10_simclr_resnet18", "knn=null"], f"{found}: a network that keeps small images whole"
    if has_gpu and count >= MANY:
        return ["recipe=dino_vits16", "knn=null"], f"{found} and a GPU: enough for a ViT from scratch"
    if has_gpu and count >= SOME and side >= SMALL:
        return ["recipe=dinov2_small"], f"{found} and a GPU: a tiny ViT from scratch"
    return ["recipe=photos_small"], f"{found}{'' if has_gpu else ' and no GPU'}: a small network from scratch"


def _directory(images: str | None, given: Mapping[str, str], recipe: str) -> Path:
    name = Path(images or given["data.shards"]).expanduser().resolve().stem if recipe == AUTO else Path(recipe).stem
    return Path("runs") / (name or "images")


def holds_shards(source: str) -> bool:
    """Whether a source of images is shards already."""
    path = Path(source).expanduser()
    return source.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def shards_of(
    images: str,
    output: Path,
    *,
    key: str = "images",
    way_out: str = IN_A_RUN,
    short_side: Callable[[Source], int | None] = lambda files: None,
) -> str:
    """Where the images are as shards: themselves, if they are some, or what is made of them, once, in `output`.

    The first process packs them, and the others wait for it. key: the setting that names them.
    way_out: what to do where they have changed since then.
    short_side: to how many pixels a source is reduced that is packed now, if at all.
    """
    if holds_shards(images):
        return images
    source = images if images == DIGITS else str(Path(images).expanduser())
    if launched_rank() == "0":
        files = open_files(source, key=key)
        side = None if is_packed(output) else short_side(files)
        return str(pack_once(source, output, key=key, way_out=way_out, short_side=side, opened=files))
    while not is_packed(output):
        time.sleep(SECONDS_BETWEEN_LOOKS)  # if the first process fails, the launcher ends this one
    return str(pack_once(source, output, key=key, way_out=way_out))


def open_source(source: str, cache: Path) -> tuple[str, ShardIndex]:
    """The images of a folder or a zip, packed once into `cache`, or of shards; ConfigError if there are none."""
    path = Path(source)
    if path.is_dir() or path.suffix == ".zip":
        source = shards_of(
            source, cache, key="source", way_out=f"Put the files back, or delete '{cache}' to pack what is there now."
        )
    index = open_shards(source)
    if not len(index):
        raise ConfigError(f"source={source} has no images.")
    return source, index


def _short_side(files: Source, recipe: str, given: Mapping[str, str]) -> int | None:
    """Pixels to which large photographs are reduced as they are packed, which is said; None where that gains little."""
    count, side = look_at(files)
    if recipe == AUTO:
        recipe = choose_recipe(count, side, given, has_gpu=torch.cuda.is_available())[0][0].removeprefix("recipe=")
    view = largest_view(read_recipe(recipe, RECIPES), given)
    short_side = max(ROOM * view, SMALLEST_PACKED)
    if side <= ROOM * short_side:
        return None
    print(
        printable(
            f"images of {side:,} pixels (median of the shorter sides) are packed as JPEG of {short_side} pixels at "
            f"most: {recipe} has views of {view}. data.shards=SHARDS of make_shards keeps them as they are."
        ),
        flush=True,
    )
    return short_side


def largest_view(recipe: Tree, given: Mapping[str, str]) -> int:
    """Pixels of the largest view that a recipe asks for, with what is given over it."""
    augment = recipe.get("augment")
    groups = augment.items() if isinstance(augment, dict) else ()
    asked = {name: str(group.get("size")) for name, group in groups if isinstance(group, dict)}
    sizes = [given.get(f"augment.{name}.size", size) for name, size in asked.items()]
    return max((int(number) for size in sizes for number in re.findall(r"\d+", size)), default=0)


def _recipe_of(output: Path) -> list[str]:
    """The recipe that the run in `output` has, as arguments; none if it has not begun."""
    settings = output / "config.yaml"
    if settings.exists():
        tree = read_yaml(settings.read_text(encoding="utf-8"), where=str(settings))
        if isinstance(tree, dict) and isinstance(tree.get("recipe"), str):
            return [f"recipe={tree['recipe']}", *(["knn=null"] if tree.get("knn") is None else [])]
    return []

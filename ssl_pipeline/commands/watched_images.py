"""How a run on `images=` is measured on these images, where nothing else is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ssl_pipeline.commands.first_look import Look
from ssl_pipeline.config import Tree, launched_rank
from ssl_pipeline.data.shards.listing import shards_may_be_at
from ssl_pipeline.eval.labelled_sets import PER_CLASS

WATCHED, WATCHED_K, WATCHED_EVERY = 2000, 20, "20%"  # images of a labelled folder, and how k-NN watches them


def watch(look: Look, shards: str, given: Mapping[str, str], recipe: Tree) -> list[str]:
    """The argument by which a run on images= is measured on these images: by k-NN, if they have labels (class folders)
    of which others of the same set can vote, else from weights by the spectrum; none if anything is given of it, or the
    recipe has images for it that are there.
    """
    if look.count <= WATCHED_K or given.keys() & {"knn", "knn.train", "knn.val"}:
        return []
    compared = min(look.count, WATCHED)
    if 1 < look.classes <= compared / PER_CLASS:  # so that some class has two of them, however they are chosen
        knn = recipe.get("knn")
        if isinstance(knn, dict) and knn.get("train") is not None and shards_may_be_at(knn["train"]):
            return []
        number, every = given.get("knn.images", f"{WATCHED:,}"), given.get("knn.every", WATCHED_EVERY)
        _say_first(
            f"The images have labels, so the run measures k-NN on up to {number} of them, each by all others, every "
            f"{every}; it does not learn from them. knn=null leaves that out."
        )
        settings = {"every": WATCHED_EVERY, "train": shards, "val": "null", "images": WATCHED, "k": WATCHED_K}
        if says(given, "knn"):
            return [f"knn.{key}={value}" for key, value in settings.items() if f"knn.{key}" not in given]
        settings["train"] = json.dumps(shards)
        return [f"knn={{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}"]
    why = (
        "have no labels"
        if look.classes < 2
        else f"are of {look.classes:,} classes, too many for k-NN on {compared:,} of them"
    )
    if given.get("backbone.weights", "null") in ("null", "") or says(given, "spectrum") or recipe.get("spectrum"):
        if look.classes > 1:
            _say_first(f"The images {why}, so the run does not measure it.")
        return []
    _say_first(
        f"The images {why}, so the run watches RankMe of the features from the initial weights on, every "
        f"{WATCHED_EVERY}. spectrum=null leaves that out."
    )
    return [f"spectrum={{every: {WATCHED_EVERY}, images: {WATCHED // 2}}}"]


def says(given: Mapping[str, str], section: str) -> bool:
    """Whether anything is given of a section."""
    return any(key == section or key.startswith(f"{section}.") for key in given)


def _say_first(words: str) -> None:
    if launched_rank() == "0":
        print(words, flush=True)

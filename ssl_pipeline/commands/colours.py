"""Mean and standard deviation of the images, where another network takes the place of the recipe's."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ssl_pipeline.backbones.known import Known, known_of, normalised
from ssl_pipeline.backbones.weights import is_tag
from ssl_pipeline.config import Tree, Value
from ssl_pipeline.data.stream import DataConfig

KEYS = ("mean", "std")


def fit_colours(tree: Tree, given: Collection[str], recipe: Tree) -> list[str]:
    """Put `data.mean` and `data.std` of the weights that are read in place of the recipe's; what to say of it.

    Only where the network is another than the recipe's, and only what is not `given`. Where neither begins with
    weights, those of the recipe are about its images, and stay.
    """
    new, old = _section(tree, "backbone"), _section(recipe, "backbone")
    name, weights = new.get("name"), new.get("weights")
    if not isinstance(name, str) or old.get("name") in (None, name) or not (weights or old.get("weights")):
        return []
    data, theirs = _section(tree, "data"), _section(recipe, "data")
    free = [key for key in KEYS if f"data.{key}" not in given and data.get(key) == theirs.get(key)]
    if not free:
        return []
    known = Known(of=f"ImageNet, as always without weights; those of the recipe are of {old['name']}")
    if isinstance(weights, str):
        if not is_tag(weights) and not Path(weights).expanduser().exists():
            return []  # reported where the weights are looked up
        which = new.get("weights_from")
        known = known_of(weights, name=name, which=which if isinstance(which, str) else None)
    values = dict(zip(KEYS, (known.mean, known.std), strict=True))
    for key in free:
        value = values[key]
        if value is None:
            data.pop(key, None)
        else:
            data[key] = list(value)
    tree["data"] = data
    mean, std = (_numbers(data.get(key, DataConfig.model_fields[key].default)) for key in KEYS)
    if mean is None or std is None:
        return []  # reported by the section, as the given value cannot be read
    of = known.of or f"ImageNet, as those of {weights} are not known"
    keys = " and ".join(f"data.{key}" for key in free)
    return [f"{normalised(mean, std, of)}. Set {keys} for other values."]


def _numbers(value: object) -> list[float] | None:
    if not isinstance(value, list | tuple):
        return None
    numbers = [one for one in value if isinstance(one, int | float)]
    return numbers if len(numbers) == len(value) else None


def _section(tree: Tree, name: str) -> dict[str, Value]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}

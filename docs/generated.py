"""The tables of README.md and docs/ that are made from the code: `python docs/generated.py` writes them anew.

They stand between `<!-- NAME -->` and `<!-- /NAME -->`; tests/docs/test_generated.py holds that they are current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dis import get_instructions
from functools import cache
from inspect import getdoc, getmodule, isclass, iscode, isfunction, unwrap
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, whatever is installed

from ssl_pipeline.backbones import BackboneConfig, create_backbone  # noqa: E402
from ssl_pipeline.batch import Views  # noqa: E402
from ssl_pipeline.commands.recipes import as_markdown, recipe_headers  # noqa: E402
from ssl_pipeline.config import RECIPES, read_yaml, recipe_files, validate  # noqa: E402
from ssl_pipeline.methods import METHODS  # noqa: E402
from ssl_pipeline.methods.base import Method  # noqa: E402

ALWAYS, PUBLISHED = ("photos", "digits_dino"), ("imagenet",)
Settings = dict[str, dict[str, object]]
OURS = ("ssl_pipeline.methods.", "ssl_pipeline.modules.")


def recipes_of_readme() -> str:
    """The recipes for photographs and the quickstart's, and for each method one of ImageNet with a published figure."""
    method_of = {recipe: method for method, recipes in _recipes_of_methods().items() for recipe in recipes}
    known = [head for folder in PUBLISHED for head in recipe_headers(folder) if "%" in head.theirs]
    first = {method_of[head.name]: head for head in reversed(known)}
    chosen = [head for head in known if head in first.values()]
    return as_markdown([head for only in ALWAYS for head in recipe_headers(only)] + chosen)


def recipes_by_folder() -> str:
    """All recipes, a table for each folder."""
    folders = dict.fromkeys(head.folder for head in recipe_headers())
    return "\n\n".join(f"## {folder}\n\n{as_markdown(recipe_headers(folder))}" for folder in folders)


def recipes_for_photos() -> str:
    """The recipes that `images=` chooses from."""
    return as_markdown(recipe_headers("photos"))


def methods() -> str:
    """Each method with its paper, its losses, what it needs and its recipes."""
    lines = ["| `method.name` | source | losses | needs | recipes |", "| --- | --- | --- | --- | --- |"]
    for method in METHODS:
        name = method.config_class.model_fields["name"].annotation.__args__[0]
        recipes = _recipes_of_methods().get(name, {})
        told = ", ".join(f"`{recipe}`" for recipe in recipes) or "-"
        losses = ", ".join(f"`{loss}`" for loss in losses_of(method))
        needs = _needs(method, list(recipes.values()))
        lines.append(f"| `{name}` | {_source(method)} | {losses} | {needs} | {told} |")
    return "\n".join(lines)


@cache
def _recipes_of_methods() -> dict[str, dict[str, Settings]]:
    """The settings of each recipe by its name, by the method that it trains."""
    found: dict[str, dict[str, Settings]] = {}
    for recipe, path in recipe_files(RECIPES).items():
        tree = read_yaml(path.read_text(encoding="utf-8"), where=recipe)
        found.setdefault(tree["method"]["name"], {})[recipe] = tree
    return found


def _source(method: type[Method]) -> str:
    """The first line of the module, its address as a link."""
    first = (getdoc(getmodule(method)) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    return re.sub(r",? *(https?://[^\s)]+)", lambda found: f", [paper]({found[1]})", first)


def losses_of(method: type[Method]) -> list[str]:
    """The functions of `ssl_pipeline.losses` that its code and that of its shared parts name, sorted."""
    found: set[str] = set()
    todo: list[object] = [kind for kind in method.__mro__ if kind.__module__.startswith(OURS) and kind is not Method]
    seen: set[object] = set()
    while todo:
        if (part := todo.pop()) in seen:
            continue
        seen.add(part)
        for named in _named_by(part):
            module = getattr(named, "__module__", None) or ""
            if module.startswith("ssl_pipeline.losses.") and not module.endswith((".precision", ".checks")):
                found |= {named.__name__} if isfunction(named) else set()
            elif module.startswith(OURS) and (isfunction(named) or isclass(named)) and named is not Method:
                todo.append(named)
    return sorted(found)


def _named_by(part: object) -> Iterator[object]:
    """The values of the global names that a function, or a function of a class, reads; annotations are none."""
    functions = [part] if isfunction(part) else [getattr(value, "__func__", value) for value in vars(part).values()]
    for function in (unwrap(function) for function in functions if isfunction(function)):
        codes = [function.__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if iscode(constant)]
            names = [step.argval for step in get_instructions(code) if step.opname == "LOAD_GLOBAL"]
            yield from (function.__globals__[name] for name in names if name in function.__globals__)


def _needs(method: type[Method], recipes: list[Settings]) -> str:
    """The groups of views that it reads by its defaults or its recipes, and what else a recipe must have for it."""
    fields = method.config_class.model_fields
    required = [name for name, field in fields.items() if field.is_required() and name != "name"]
    own = [] if required else [{**recipes[0], "method": {"name": recipes[0]["method"]["name"]}}]
    needs = [needs_of(method, recipe) for recipe in (*own, *recipes)]
    groups = dict.fromkeys(group for of_recipe in needs for group in map(_group, of_recipe))
    always = {group for group in groups if all(group in map(_group, of_recipe) for of_recipe in needs)}
    told = ["views " + ", ".join(group if group in always else f"{group} (by settings)" for group in groups)]
    masked = any(views.mask is not None for of_recipe in needs for views in of_recipe)
    told += ["a network with patch tokens"] if masked else []
    return "; ".join(told + [f"`method.{name}`" for name in required])


def needs_of(method: type[Method], recipe: Settings) -> tuple[Views, ...]:
    """What the method of a recipe needs, with the recipe's network; without memory, and no file is looked for."""
    backbone = validate(BackboneConfig, recipe["backbone"])
    without_weights = {"weights": None, "weights_from": None, "frozen_batch_norm": False}
    with torch.device("meta"):
        network = create_backbone(backbone.model_copy(update=without_weights))
        return method(validate(method.config_class, recipe["method"]), network).needs


def _group(views: Views) -> str:
    times = f" x {views.count}" if views.count else ""
    with_labels = " (with labels)" if views.labelled or views.with_labels else ""
    return f"`{views.name}`{times}{with_labels}{' (if any)' if views.optional else ''}"


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"recipes": recipes_of_readme},
    "docs/images.md": {"recipes": recipes_for_photos},
    "docs/recipes.md": {"recipes": recipes_by_folder},
    "docs/methods.md": {"methods": methods},
}
"""The blocks of each file, by the name that stands in its marks."""


def renewed(text: str, blocks: dict[str, Callable[[], str]], *, where: str) -> str:
    """The text with its blocks as they are now; ValueError if one has no marks."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"{where} must have <!-- {name} --> and <!-- /{name} --> on lines of their own.")
        text = f"{before}{begin}\n{block()}\n{end}{after}"
    return text


def main() -> None:
    """Write every table anew."""
    for name, blocks in TABLES.items():
        path = ROOT / name
        path.write_text(renewed(path.read_text(encoding="utf-8"), blocks, where=name), encoding="utf-8")


if __name__ == "__main__":
    main()

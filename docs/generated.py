"""The tables of README.md and docs/ that are made from the code: `python docs/generated.py` writes them anew.

They stand between `<!-- NAME -->` and `<!-- /NAME -->`; tests/docs/test_generated.py holds that they are current.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from inspect import getfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, whatever is installed

from ssl_pipeline.commands.recipes import as_markdown, recipe_headers  # noqa: E402
from ssl_pipeline.config import RECIPES, read_yaml, recipe_files  # noqa: E402
from ssl_pipeline.methods import METHODS  # noqa: E402
from ssl_pipeline.methods.base import Method  # noqa: E402

ALWAYS, PUBLISHED = ("photos", "digits"), ("imagenet",)


def recipes_of_readme() -> str:
    """The recipes for photographs and for a first run, and for each method one of ImageNet with a published figure."""
    method_of = {recipe: method for method, recipes in _recipes_of_methods().items() for recipe in recipes}
    known = [head for folder in PUBLISHED for head in recipe_headers(folder) if "%" in head.theirs]
    first = {method_of[head.name]: head for head in reversed(known)}
    chosen = [head for head in known if head in first.values()]
    return as_markdown([head for folder in ALWAYS for head in recipe_headers(folder)] + chosen)


def recipes_by_folder() -> str:
    """All recipes, a table for each folder."""
    folders = dict.fromkeys(head.folder for head in recipe_headers())
    return "\n\n".join(f"## {folder}\n\n{as_markdown(recipe_headers(folder))}" for folder in folders)


def recipes_for_photos() -> str:
    """The recipes that `images=` chooses from."""
    return as_markdown(recipe_headers("photos"))


def methods() -> str:
    """Each method with its paper, its losses, what it needs and its recipes."""
    recipes = _recipes_of_methods()
    lines = ["| `method.name` | source | losses | needs | recipes |", "| --- | --- | --- | --- | --- |"]
    for method in METHODS:
        name = method.config_class.model_fields["name"].annotation.__args__[0]
        tree = ast.parse(Path(getfile(method)).read_text(encoding="utf-8"))
        parts = [tree, *_modules(tree)]
        told = ", ".join(f"`{recipe}`" for recipe in recipes.get(name, ())) or "-"
        losses = ", ".join(f"`{loss}`" for loss in dict.fromkeys(_losses(parts))) or "cross-entropy"
        lines.append(f"| `{name}` | {_source(tree)} | {losses} | {_needs(method, tree, parts)} | {told} |")
    return "\n".join(lines)


def _recipes_of_methods() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for recipe, path in recipe_files(RECIPES).items():
        tree = read_yaml(path.read_text(encoding="utf-8"), where=recipe)
        found.setdefault(tree["method"]["name"], []).append(recipe)
    return found


def _source(tree: ast.Module) -> str:
    """The first line of the module, its address as a link."""
    first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    return re.sub(r",? *(https?://[^\s)]+)", lambda found: f", [paper]({found[1]})", first)


def _modules(tree: ast.Module) -> list[ast.Module]:
    """The shared parts of `ssl_pipeline.modules` that a method is made of."""
    imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    files = [ROOT / f"{name.replace('.', '/')}.py" for name in imports if name.startswith("ssl_pipeline.modules.")]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in files]


def _losses(trees: list[ast.Module]) -> Iterator[str]:
    """What they take from `ssl_pipeline.losses`, but for what only looks at numbers."""
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = node.module or ""
        if module.startswith("ssl_pipeline.losses") and not module.endswith((".precision", ".checks")):
            yield from (alias.name for alias in node.names if alias.name.islower())


def _needs(method: type[Method], tree: ast.Module, parts: list[ast.Module]) -> str:
    """Its groups of views, and what else a recipe must have for it."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Views"]
    groups = [_group(call) for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    needs = ["views " + ", ".join(dict.fromkeys(groups))] if groups else []
    needs += ["a network with patch tokens"] if any("require_tokens" in ast.unparse(part) for part in parts) else []
    fields = method.config_class.model_fields
    needs += ["`method.tokenizer`"] if "tokenizer" in fields else []
    needs += ["`method.teacher`"] if "teacher" in fields else []
    return "; ".join(needs) or "-"


def _group(call: ast.Call) -> str:
    keywords = {word.arg: word.value for word in call.keywords}
    count = keywords.get("count")
    times = f" x {count.value}" if isinstance(count, ast.Constant) and count.value else ""
    labelled = isinstance(keywords.get("labelled"), ast.Constant) and keywords["labelled"].value
    optional = isinstance(keywords.get("optional"), ast.Constant) and keywords["optional"].value
    return f"`{call.args[0].value}`{times}{' (with labels)' if labelled else ''}{' (if any)' if optional else ''}"


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

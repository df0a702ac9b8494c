"""Where settings come from: recipe files, and the `key=value` arguments over them, as plain YAML values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_origin

from ssl_pipeline.config.schema import Config, ConfigError, Tree, Value, annotation_of, kinds_of, nearest, value_at
from ssl_pipeline.config.yaml_text import read_yaml

PACKAGE = Path(__file__).parents[1]
RECIPES = next(filter(Path.is_dir, (PACKAGE / "recipes", PACKAGE.parent / "recipes")), PACKAGE / "recipes")
"""Settings of `pretrain.py`: those that a wheel has packed into the package, else those of the checkout beside it."""
COMPARISONS = RECIPES / "comparisons"
"""Settings of `eval.compare`; a name for `pretrain.py` never means one of these."""


def recipe_files(folder: Path) -> dict[str, Path]:
    """The recipes below a folder by their file name, sorted; raises ConfigError if two have the same."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (path.stem, path)):
        if COMPARISONS.name in path.relative_to(folder).parts:
            continue
        if path.stem in files:
            raise ConfigError(f"Two recipes have the name '{path.stem}': {files[path.stem]} and {path}. Rename one.")
        files[path.stem] = path
    return files


def read_recipe(name: str, folder: Path) -> Tree:
    """The settings of the recipe `name` below `folder`, or of the file itself if a path to one is given."""
    known = recipe_files(folder)
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        raise ConfigError(f"No recipe '{name}'.{nearest(name, list(known))} Known: {', '.join(known)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: byte {error.start} is not UTF-8.") from None
    tree = read_yaml(text, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values. Got {tree!r}.")
    return tree


def read_arguments(schema: type[Config], argv: Sequence[str], recipes: Path | None) -> Tree:
    """Recipe and `key=value` arguments as plain values; raises ConfigError that lists all that cannot be read."""
    tree: Tree = {}
    given = _pairs(schema, argv)
    if recipes is not None and "recipe" in given:
        name, *more = given.pop("recipe")
        if more:
            raise ConfigError(f"recipe= is given {len(more) + 1} times; one run has one recipe.")
        tree = read_recipe(name, recipes) | {"recipe": name}
    mistakes = []
    for key in sorted(given, key=lambda key: not key.endswith(".name")):  # names say what other keys mean
        text, *more = given[key]
        if more:
            raise ConfigError(f"{key} is given twice: '{text}' and '{more[0]}'.")
        try:
            _assign(tree, key.split("."), _value(schema, tree, key, text))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return tree


def _pairs(schema: type[Config], argv: Sequence[str]) -> dict[str, list[str]]:
    """The texts that each key is given."""
    pairs: dict[str, list[str]] = {}
    mistakes = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if schema.positional and not equals and not key.startswith("-"):
            key, text = schema.positional, argument
        elif not equals or not all(key.split(".")) or key.startswith("-"):
            hint = f" Try {key.lstrip('-')}={text or 'VALUE'}." if key.startswith("-") else ""
            mistakes.append(f"'{argument}' is not of the form key=value.{hint}")
        pairs.setdefault(key, []).append(text)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return pairs


def _value(schema: type[Config], tree: Tree, key: str, text: str) -> Value:
    """YAML, but for what only the command line needs: a text key takes the text as it stands, `10,20` is a list."""
    annotation: object | None = schema
    inside: Value = tree
    for name in key.split("."):
        annotation, inside = annotation_of(annotation, inside, name), value_at(inside, name)
    kinds = kinds_of(annotation).all
    if annotation is not None and all(kind in (str, Path) for kind in kinds):
        return None if text in ("", "~", "null") else text
    value = read_yaml(text, where=f"{key}={text}")
    if any(get_origin(kind) is tuple for kind in kinds):
        if isinstance(value, str) and "," in value:
            return [read_yaml(part, where=key) for part in value.split(",")]
        if isinstance(value, int | float | str) and len(kinds) == 1:
            return [value]
    return value


def _assign(tree: Tree, location: Sequence[str], value: Value) -> None:
    """Set one dotted key; a bare value over a schedule's section sets its `value`."""
    *parents, last = location
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {} if child is None else {"value": child}
        tree = child
    old = tree.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, item in value.items():
            _assign(old, (name,), item)
    elif isinstance(old, dict) and "value" in old and value is not None:
        old["value"] = value
    else:
        tree[last] = value

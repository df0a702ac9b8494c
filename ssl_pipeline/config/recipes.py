"""Recipe files: complete settings, found by their name in any folder below the recipes' own."""

from __future__ import annotations

from pathlib import Path

from ssl_pipeline.config.base import ConfigError, Tree, at_home, nearest, some_of
from ssl_pipeline.config.yaml_text import read_yaml

PACKAGE = Path(__file__).parents[1]
RECIPES = next(filter(Path.is_dir, (PACKAGE / "recipes", PACKAGE.parent / "recipes")), PACKAGE / "recipes")
"""Settings of `pretrain.py`: those that a wheel has packed into the package, otherwise those of the checkout next to
it."""
COMPARISONS = RECIPES / "comparisons"
"""Settings of `eval.compare`; a name for `pretrain.py` never means one of these."""
SELF_TRAINING = RECIPES / "self_training"
"""Settings of `eval.self_training`; the same holds for them."""
LISTED_BY = "python -m ssl_pipeline recipes"
OTHERS = {COMPARISONS.name, SELF_TRAINING.name}


def recipe_files(folder: Path) -> dict[str, Path]:
    """The recipes below a folder by their file name, sorted; raises ConfigError if two have the same."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (path.stem, path)):
        if OTHERS & set(path.relative_to(folder).parts):
            continue
        if path.stem in files:
            raise ConfigError(f"Two recipes have the name '{path.stem}': {files[path.stem]} and {path}. Rename one.")
        files[path.stem] = path
    return files


def text_of_recipe(path: Path) -> str:
    """What stands in a file; raises ConfigError if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is not valid.") from None


def read_recipe(name: str, folder: Path) -> Tree:
    """The settings of the recipe `name` below `folder`, or of the file itself if a path to one is given."""
    known = recipe_files(folder)
    path = Path(at_home(name)) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        near = nearest(name, list(known))
        listed = some_of(list(known), name, all_by=LISTED_BY if folder == RECIPES else "")
        raise ConfigError(f"No recipe '{name}'.{near} Known: {listed}")
    tree = read_yaml(text_of_recipe(path), where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values. Got {tree!r}.")
    return tree

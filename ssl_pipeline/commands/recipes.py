"""The shipped recipes in a table: what each trains, its authors' cost and figures, and ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

from ssl_pipeline.commands.recipe_headers import UNKNOWN, RecipeHeader, read_header
from ssl_pipeline.config import RECIPES, Config, ConfigError, nearest, recipe_files, run_command

COLUMNS = ("recipe", "what it trains", "cost", "theirs", "ours")


class RecipesConfig(Config):
    """List the recipes with what they train, the cost and figures of their source, and figures of this library.

    A figure that nobody has published or measured is `-`. `pretrain recipe=NAME --print` shows the settings of one.
    """

    positional = "only"

    only: str | None = None
    """A folder of recipes (photos, digits, cifar10, imagenet, ...), or a part of a name, such as dino."""
    format: Literal["text", "markdown"] = "text"
    """Lines for a terminal, or a table for a page."""


def recipe_headers(only: str | None = None) -> list[RecipeHeader]:
    """The heads of the shipped recipes, by folder and name; ConfigError if none is in the folder or has the name.

    A file whose head cannot be read is left out, and a warning names it.
    """
    headers = sorted(_readable_headers(), key=lambda head: (head.folder, head.name))
    folders = sorted({head.folder for head in headers})
    found = [head for head in headers if only is None or only == head.folder or (only in head.name)]
    if only in folders:
        found = [head for head in found if head.folder == only]
    found = [head for head in found if head.name == only] or found  # a whole name, which longer ones may contain
    if not found:
        raise ConfigError(
            f"No recipe has '{only}' in its name, and no folder of recipes is called so ({', '.join(folders)})."
            f"{nearest(str(only), [head.name for head in headers])}"
        )
    return found


def _readable_headers() -> Iterator[RecipeHeader]:
    for path in recipe_files(RECIPES).values():
        try:
            yield read_header(path)
        except ConfigError as error:
            warnings.warn(f"Left out: {error}", stacklevel=3)


def as_markdown(headers: Sequence[RecipeHeader]) -> str:
    """A table of Markdown, without a line break at its end."""
    rows = [(f"`{head.name}`", head.what, head.cost, head.theirs, head.ours) for head in headers]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def as_text(headers: Sequence[RecipeHeader]) -> str:
    """A line for each recipe, and below it what is known of its cost and figures."""
    lines, width = [], max(len(head.name) for head in headers)
    for number, head in enumerate(headers):
        if number == 0 or head.folder != headers[number - 1].folder:
            lines.append(f"{head.folder}:")
        lines.append(f"  {head.name:{width}}  {head.what}")
        facts = {"cost": head.cost, "theirs": head.theirs, "ours": head.ours}
        known = [f"{name}: {fact}" for name, fact in facts.items() if fact != UNKNOWN]
        if known:
            lines.append(f"  {'':{width}}    {'; '.join(known)}")
    return "\n".join(lines)


def list_recipes(config: RecipesConfig) -> None:
    """Print the table."""
    headers = recipe_headers(config.only)
    print(as_markdown(headers) if config.format == "markdown" else as_text(headers))


def command(name: str = "ssl-pipeline recipes") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(RecipesConfig, list_recipes, command=name)

"""The start of `pretrain.py`: what must not wait for torch, whose import takes seconds.

Here arguments are read as far as possible without the schema, whose classes import torch: their form, the recipe's
name, the recipe itself, the names of the keys, and the values of those whose types need no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ssl_pipeline.commands.early_values import wrong_values
from ssl_pipeline.commands.key_names import sections_in_sources, unknown_keys
from ssl_pipeline.config import RECIPES, launched_rank, recipe_files, refuse, without_flags
from ssl_pipeline.config.arguments import pairs_and_recipe
from ssl_pipeline.config.base import SettingsError
from ssl_pipeline.config.recipes import LISTED_BY
from ssl_pipeline.run.launcher import have_the_last_word, watch_launcher

INTERRUPTED = 130  # exit code after Ctrl-C

BEGIN = """usage: {call} images=FOLDER [recipe=NAME] [key=value ...] [--help] [--print] [--debug]

To begin, with your own images (a folder of any depth, or a zip):
  {call} images=photos/

With images that are included:
  {make} source=digits split=train output=data/digits/train
  {make} source=digits split=test output=data/digits/test
  {call} recipe=digits_dino

The same command resumes a run. --help lists all keys, with recipe=NAME those of its method, --help optim those of a
section; --print shows the settings.
recipes for photographs: {recipes}; {all} lists all of them"""


def command(name: str = "pretrain.py") -> int:
    """The command line, called `name`; returns the exit code."""
    return start(name, how_to_begin, "ssl_pipeline.commands.pretrain")


def start(name: str, usage: Callable[[str], str], module: str, *, own: Sequence[str] = ()) -> int:
    """Read what needs no torch, then call `main(name)` of `module`; returns the exit code.

    usage: what a call without arguments shows, for the name that the command is called by. own: keys that the command
    has in addition to those of a run.
    """
    launcher, first = watch_launcher(), launched_rank() == "0"
    arguments = sys.argv[1:]
    if not arguments:
        print(usage(name))
        return 2
    try:
        given, _ = without_flags(arguments)
        if place := next((word for word in given if "=" not in word and Path(word).exists()), None):
            key = "train" if "train" in own else "images"
            raise SettingsError(f"'{place}' is not of the form key=value. Try {key}={place}.")
        pairs, recipe = pairs_and_recipe([argument for argument in given if argument != "recipe=auto"], RECIPES)
        names = {key: text for key, text in pairs if key not in own}
        if "method.name" in names:
            recipe["method"] = {"name": names["method.name"]}
        sections = sections_in_sources()
        mistakes = unknown_keys(names, recipe, sections, own=own) + wrong_values(pairs, recipe, sections, own=own)
        if mistakes:
            raise SettingsError(*mistakes, f"See: {name} --help")
    except Exception as error:
        return refuse(error, running=False)
    if first:
        print("Loading torch and timm: a few seconds ...", file=sys.stderr, flush=True)
    try:
        code: int = import_module(module).main(name)
    except KeyboardInterrupt:  # while torch is imported, images are packed, or a trial is made
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if code == INTERRUPTED and launcher is not None and first:
        have_the_last_word(launcher, "Interrupted. The same command resumes from the newest checkpoint.")
    return code


def how_to_begin(name: str) -> str:
    """What a call without arguments shows: commands to copy, under the names that this installation has for them."""
    installed = not name.endswith(".py")
    call, make, listed = (
        (name, "ssl-pipeline make-shards", "ssl-pipeline recipes")
        if installed
        else (f"python {name}", "python -m data_tools.make_shards", LISTED_BY)
    )
    photos = ", ".join(name for name, path in recipe_files(RECIPES).items() if path.parent.name == "photos")
    return BEGIN.format(call=call, make=make, recipes=photos, all=listed)


if __name__ == "__main__":
    sys.exit(command())

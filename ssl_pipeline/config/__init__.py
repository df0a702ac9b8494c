"""Settings: pydantic is the schema, YAML the syntax, `key=value` the command line of every command.

The order of reading: the recipe file, the command line on top, then the defaults of the schema. Two rules make partial
settings safe: a section that is mentioned keeps the defaults of the keys it does not mention, and a bare number given
to a schedule sets its `value` and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from ssl_pipeline.config.schema import Config, ConfigError, RunError, Tree, Value, complete, nearest
from ssl_pipeline.config.sentences import TOO_DEEP, help_page, mistakes
from ssl_pipeline.config.sources import COMPARISONS, RECIPES, read_arguments, read_recipe, recipe_files
from ssl_pipeline.config.yaml_text import YamlDumper, read_yaml

__all__ = [
    "COMPARISONS",
    "RECIPES",
    "Config",
    "ConfigError",
    "RunError",
    "Tree",
    "Value",
    "dump",
    "load",
    "nearest",
    "read_recipe",
    "read_yaml",
    "recipe_files",
    "run_command",
    "validate",
]

ConfigType = TypeVar("ConfigType", bound=Config)


def dump(config: Config) -> str:
    """The resolved settings as YAML that `load` reads back to an equal config."""
    plain = config.model_dump(mode="json")
    return yaml.dump(plain, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=110)


def load(
    schema: type[ConfigType], argv: Sequence[str], *, command: str = "", recipes: Path | None = None
) -> ConfigType:
    """Settings from `key=value` arguments, over the recipe that `recipe=NAME` names.

    Raises ConfigError that lists every mistake at once, each with the nearest known name.
    """
    tree = read_arguments(schema, argv, recipes)
    try:
        return validate(schema, tree, command=command)
    except ConfigError as error:
        if recipes is None or "recipe" in tree:
            raise
        raise ConfigError(
            f"{error}\nNo recipe is given: recipe=NAME, one of {', '.join(recipe_files(recipes))}"
        ) from None


def validate(schema: type[ConfigType], tree: Tree, *, command: str = "") -> ConfigType:
    """A config from plain YAML values, with the two rules of this module applied."""
    completed = complete(schema, tree)
    try:
        # JSON mode: lists become tuples and text becomes paths, yet `true` stays no number and "1" no integer.
        return schema.model_validate_json(json.dumps(completed))
    except ValidationError as error:
        sentences = mistakes(schema, completed, error)
    except RecursionError:
        sentences = [TOO_DEEP]
    help_line = f"\nSee: {command} --help" if command else ""
    raise ConfigError("\n".join(sentences) + help_line)


def run_command(
    schema: type[ConfigType],
    run: Callable[[ConfigType], int | None],
    *,
    command: str,
    argv: Sequence[str] | None = None,
    recipes: Path | None = None,
) -> int:
    """Read the arguments, call `run` with the config and return the exit code.

    0 is success, 1 a failed run, 2 a mistake in settings or data (one `error:` line on stderr for either), 130 an
    interrupt. `--help` lists every key, `--print` shows the resolved settings, `--debug` where errors and warnings come
    from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = {flag for flag in ("--help", "-h", "--print", "--debug") if flag in arguments}
    arguments = [argument for argument in arguments if argument not in flags]
    rank = os.environ.get("RANK", "0")
    running = False
    if "--debug" not in flags:
        warnings.formatwarning = lambda message, *_, **__: (
            f"warning: {message}\n"
        )  # not the place, of which no user knows
    try:
        if flags & {"--help", "-h"}:
            print(help_page(schema, arguments, command, recipes))
            return 0
        config = load(schema, arguments, command=command, recipes=recipes)
        if "--print" in flags:
            print(dump(config), end="")
            return 0
        running = True
        return run(config) or 0
    except BrokenPipeError:  # whoever read our output (`--help | head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RunError) as error:
        if "--debug" in flags:
            traceback.print_exc()
        elif not isinstance(error, ConfigError | RunError | OSError):
            # A plain ValueError may be a bug of ours: name the place, so that a report is useful.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            error = ConfigError(f"{error} (from {Path(frame.filename).name}:{frame.lineno}; --debug shows more)")
        if rank == "0" or running:  # the arguments are the same on all ranks, what happens later is not
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

"""Settings: pydantic is the schema, YAML the syntax, `key=value` the command line of every command.

The order of reading: the recipe file, the command line on top, then the defaults of the schema. Two rules make partial
settings safe: a section that is mentioned keeps the defaults of the keys it does not mention, and a bare number given
to a schedule sets its `value` and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from ssl_pipeline.config.arguments import origins, read_arguments
from ssl_pipeline.config.base import (
    ChangeMark,
    Config,
    ConfigError,
    MayChange,
    PlaceText,
    RunError,
    SettingsError,
    Tree,
    Value,
    at_home,
    is_there,
    nearest,
    sentences_of,
    some_of,
)
from ssl_pipeline.config.failures import failure_sentence, is_out_of_memory, memory_asked_for, without_number
from ssl_pipeline.config.help import help_page
from ssl_pipeline.config.printing import bar_interval, launched_processes, launched_rank, printable
from ssl_pipeline.config.ranges import BatchSize, Depth, InRange, Processes, Seed, Width
from ssl_pipeline.config.recipes import COMPARISONS, LISTED_BY, RECIPES, SELF_TRAINING, read_recipe, recipe_files
from ssl_pipeline.config.schema import complete
from ssl_pipeline.config.sentences import TOO_DEEP, UNKNOWN_KEY, mistakes
from ssl_pipeline.config.termination import Terminated, terminated_like_interrupted
from ssl_pipeline.config.yaml_text import YamlDumper, read_yaml

__all__ = [
    "COMPARISONS",
    "RECIPES",
    "SELF_TRAINING",
    "BatchSize",
    "ChangeMark",
    "Config",
    "ConfigError",
    "Depth",
    "InRange",
    "MayChange",
    "PlaceText",
    "Processes",
    "RunError",
    "Seed",
    "Tree",
    "Value",
    "Width",
    "at_home",
    "bar_interval",
    "dump",
    "failure_sentence",
    "is_out_of_memory",
    "is_there",
    "launched_processes",
    "launched_rank",
    "load",
    "memory_asked_for",
    "nearest",
    "printable",
    "read_recipe",
    "read_yaml",
    "recipe_files",
    "refuse",
    "run_command",
    "sentences_of",
    "some_of",
    "validate",
    "without_flags",
    "without_number",
]

HELP = {"--help", "-h"}
FLAGS = (*HELP, "--print", "--debug")
ConfigType = TypeVar("ConfigType", bound=Config)


def dump(config: Config) -> str:
    """The resolved settings as YAML that `load` reads back to an equal config."""
    plain = config.model_dump(mode="json")
    return yaml.dump(plain, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=110)


def load(
    schema: type[ConfigType],
    argv: Sequence[str],
    *,
    command: str = "",
    recipes: Path | None = None,
    overrides: Mapping[str, Value] | None = None,
) -> ConfigType:
    """Settings from `key=value` arguments, over the recipe that `recipe=NAME` names.

    overrides: values by their dotted keys, over the arguments.

    Raises ConfigError that lists every mistake at once, each with the nearest known name.
    """
    tree = read_arguments(schema, argv, recipes, overrides)
    try:
        return validate(schema, tree, command=command)
    except ConfigError as error:
        if recipes is None or "recipe" in tree:
            raise
        told = sentences_of(error)
        if unknown := [sentence for sentence in told if sentence.startswith(UNKNOWN_KEY)]:
            raise SettingsError(*unknown) from None  # maybe it was images= or recipe= that was meant
        known = some_of(list(recipe_files(recipes)), "", all_by=LISTED_BY)
        raise SettingsError(f"No recipe is given: recipe=NAME, one of {known}", *told) from None


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
    raise SettingsError(*sentences, *([f"See: {command} --help"] if command else []))


def _require_one_process(command: str) -> None:
    """Raise ConfigError where a launcher has started several: each would do all the work, and write the same files."""
    if launched_processes() > 1:
        raise ConfigError(
            f"{command} takes one process, and a launcher started more (WORLD_SIZE={launched_processes()}). Run it "
            "without a launcher. Processes share the work of pretrain.py, finetune.py, eval.suite, eval.embed, "
            "data_tools.deduplicate and data_tools.curate."
        )


def run_command(
    schema: type[ConfigType],
    run: Callable[[ConfigType], int | None],
    *,
    command: str,
    argv: Sequence[str] | None = None,
    recipes: Path | None = None,
    check: Callable[[ConfigType], None] | None = None,
    shared: bool = False,
) -> int:
    """Read the arguments, call `run` with the config and return the exit code.

    shared: whether several processes, started by a launcher, share the work; other commands refuse to be started so.
    check: raises ConfigError for settings that `run` would refuse before it does anything; `--print` shows its error
    below the settings.

    0 is success, 1 a failed run or a bug, 2 a mistake in settings or data (one `error:` line on stderr for either), 130
    an interrupt, 143 the same by SIGTERM. `--help` lists every key, `--help SECTION` some, `--print` shows the resolved
    settings, `--debug` where errors and warnings come from.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments, flags = without_flags(given)
    running = False
    if "--debug" not in flags:
        # without the source line, which means nothing to a user
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        if flags & HELP:
            places = [word for word in given if not _is_argument(word)]
            print(help_page(schema, arguments, places, command, recipes))
            return 0
        config = load(schema, arguments, command=command, recipes=recipes)
        if "--print" in flags:
            print(f"{dump(config)}{origins(schema, arguments, recipes)}", flush=True)
            if check is not None:
                check(config)
            return 0
        if not shared:
            _require_one_process(command)
        running = True
        with terminated_like_interrupted():
            return run(config) or 0
    except BrokenPipeError:  # the reader of our output (`--help | head`) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in flags:
            print(printable(traceback.format_exc(), longest=None, lines=True), end="", file=sys.stderr)
        return refuse(error, running=running)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def without_flags(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """The arguments, and the flags among them that every command knows; after `--help` words name sections."""
    flags = {flag for flag in FLAGS if flag in argv}
    arguments = [argument for argument in argv if argument not in flags]
    return [argument for argument in arguments if not flags & HELP or _is_argument(argument)], flags


def _is_argument(word: str) -> bool:
    return "=" in word or word.startswith("-")


def refuse(error: Exception, *, running: bool) -> int:
    """Print an error as the user reads it, a line per sentence; returns the exit code of its kind.

    Before the run the first process of each machine prints, as all have the same error; during it each prints its own.
    """
    rank = launched_rank()
    if rank == "0" or running or os.environ.get("LOCAL_RANK", "0") == "0":
        sentences = error.sentences if isinstance(error, SettingsError) else [failure_sentence(error)]
        text = "\n".join(printable(sentence) for sentence in sentences)
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {text}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ValueError | OSError) else 1

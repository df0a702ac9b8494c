"""Commands of a page, run as they stand: in this process, since each would import torch anew, and with few images."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
PREPARES = {".", "make", "pip"}
"""First words of what a test of a page does not do: `make` and `pip` install, `.` enters what they installed."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of a page that is not marked as not run."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for mark, language, text in found if not mark]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], more: list[str]) -> int:
    """Run a command of this library with further arguments; returns its exit code."""
    module, given = entry_of(words)
    with mock.patch.object(sys, "argv", [module, *given, *more]):
        if module == "ssl_pipeline.commands.pretrain":
            return import_module(module).main("pretrain.py")
        return import_module(module).command()


def entry_of(words: list[str]) -> tuple[str, list[str]]:
    """The module behind a command, and the command's arguments."""
    if "pretrain.py" in words:
        return "ssl_pipeline.commands.pretrain", words[words.index("pretrain.py") + 1 :]
    console = import_module("ssl_pipeline.commands.console").COMMANDS
    if words[0] == "ssl-pipeline" or "ssl_pipeline" in words:
        name, *given = words[1:] if words[0] == "ssl-pipeline" else words[words.index("ssl_pipeline") + 1 :]
        return ("ssl_pipeline.commands.pretrain" if name == "pretrain" else console[name]), given
    assert words[:2] == ["python", "-m"], words
    room, _, name = words[2].partition(".")
    assert room in ("eval", "data_tools"), words
    return console[name.replace("_", "-")], words[3:]

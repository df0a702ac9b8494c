"""The console command runs the same commands as the scripts, under its own name."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from ssl_pipeline.commands import console
from ssl_pipeline.commands.console import COMMANDS, main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ssl-pipeline", *arguments])
    return main()


def test_every_command_of_the_package_has_a_name():
    package = Path(console.__file__).parents[1]
    defining = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "command"
    }
    assert set(COMMANDS.values()) == defining
    assert all(callable(import_module(module).command) for module in COMMANDS.values())


def test_a_command_is_run_under_its_name(monkeypatch, capsys):
    assert run(monkeypatch, "table", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ssl-pipeline table [key=value ...]")
    assert run(monkeypatch, "table", "rnu=x") == 2
    assert "See: ssl-pipeline table --help" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ssl-pipeline {version('ssl-pipeline')}\n"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 0
    assert f"commands: {', '.join(COMMANDS)}" in capsys.readouterr().out


def test_an_unknown_command_is_a_mistake(monkeypatch, capsys):
    assert run(monkeypatch, "pretrian", "recipe=x") == 2
    assert capsys.readouterr().err == "error: There is no command 'pretrian'. Did you mean 'pretrain'?\n"

"""Commands: exit codes, `--help`, `--print`, `--debug`, arguments without a key."""

import errno
import os
import re
import warnings
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from ssl_pipeline.config import Config, ConfigError, RunError, read_yaml, run_command, validate
from ssl_pipeline.schedule import Schedule


class CheckConfig(Config):
    """Check a folder."""

    positional: ClassVar[str | None] = "directory"

    directory: str
    """What is checked."""
    depth: int = 1
    """How deep; 1 is the folder itself."""
    names: tuple[str, ...] = ()
    kinds: tuple[Literal["few", "many"], ...] = ()


def run(outcome, *argv: str, shared: bool = False) -> int:
    def check(config: CheckConfig) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run_command(CheckConfig, check, command="python -m check", argv=argv, shared=shared)


def test_success_is_zero(capsys):
    assert run(None, "directory=x") == 0
    assert run(3, "directory=x") == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (ConfigError("No such thing."), 2, "error: No such thing.\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "error: No such file or directory: 'x'\n",
        ),
        (RunError("The loss is nan."), 1, "error: The loss is nan.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_are_one_line_with_an_exit_code(capsys, outcome, code, line):
    assert run(outcome, "directory=x") == code
    assert capsys.readouterr().err == line


def test_a_value_error_of_ours_names_its_place(capsys):
    assert run(ValueError("odd shape"), "directory=x") == 2
    assert "error: odd shape (from test_commands.py:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ZeroDivisionError(), "error: unexpected ZeroDivisionError (from test_commands.py:"),
        (KeyError("teacher"), "error: unexpected KeyError: 'teacher' (from test_commands.py:"),
        (RuntimeError("Odd. Set weights_only=False.\nTrace: ..."), "error: unexpected RuntimeError: Odd. (from test_"),
        (AssertionError("x" * 10_000), "error: unexpected AssertionError: xxx"),
    ],
)
def test_a_bug_is_one_line_that_names_its_place(capsys, error, sentence):
    assert run(error, "directory=x") == 1
    printed = capsys.readouterr().err
    assert printed.startswith(sentence)
    assert printed.endswith("; --debug shows more)\n")
    assert len(printed) < 500
    assert printed.count("\n") == 1
    assert run(error, "directory=x", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ... see https://pytorch.org PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), ""),
        (torch.OutOfMemoryError(GPU), " (2.50 GiB were asked for)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes. Error"),
            " (12 bytes",
        ),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
        (RuntimeError("can't start new thread"), ""),
    ],
)
def test_out_of_memory_is_one_sentence_whoever_says_it(capsys, error, asked):
    run(error, "directory=x")
    assert capsys.readouterr().err.startswith(f"error: Out of memory{asked}")


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EMFILE, "ulimit -n 65536"), (errno.ENOSPC, "Free some space"), (errno.EROFS, "Choose")],
)
def test_an_error_of_the_system_says_what_to_do(capsys, number, advice):
    assert run(OSError(number, os.strerror(number), "x"), "directory=x") == 2
    printed = capsys.readouterr().err
    assert os.strerror(number) in printed
    assert advice in printed


def test_a_mistake_in_an_argument_is_two(capsys):
    assert run(None, "directory=x", "dept=3") == 2
    assert capsys.readouterr().err == "error: Unknown key 'dept'. Did you mean 'depth'?\nSee: python -m check --help\n"


def test_debug_shows_the_traceback(capsys):
    assert run(ConfigError("No such thing."), "directory=x", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: No such thing.\n")


def test_a_warning_is_one_line_and_names_its_place_with_debug(capsys, monkeypatch):
    place = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", place)
    run(None, "directory=x", "--debug")
    assert warnings.formatwarning is place
    run(None, "directory=x")
    assert warnings.formatwarning("Little memory.", UserWarning, "workers.py", 3) == "warning: Little memory.\n"


def test_other_processes_leave_mistakes_in_arguments_to_the_first_of_their_machine(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # a RANK alone is left over from something else
    assert run(None, "directory=x", "dept=3") == 2
    assert capsys.readouterr().err == ""
    assert run(RunError("The loss is nan."), "directory=x", shared=True) == 1
    assert capsys.readouterr().err == "error on rank 1: The loss is nan.\n"
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine, where the command may be another
    assert run(None, "directory=x", "dept=3") == 2
    assert capsys.readouterr().err.startswith("error on rank 1: Unknown key 'dept'.")


def test_a_command_that_several_processes_do_not_share_refuses_them(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(None, "directory=x", shared=True) == 0
    assert run(RunError("not reached"), "directory=x") == 2
    assert capsys.readouterr().err.startswith(
        "error: python -m check takes one process, and a launcher started more (WORLD_SIZE=2). Run it without"
    )


def test_an_argument_without_a_key_sets_the_positional_field(capsys):
    assert run(None, "--print", "some/where", "depth=2") == 0
    assert read_yaml(capsys.readouterr().out, where="out") == {
        "directory": "some/where",
        "depth": 2,
        "names": [],
        "kinds": [],
    }
    assert run(None, "a", "b") == 2
    assert capsys.readouterr().err == "error: directory is given twice: 'a' and 'b'.\n"
    assert run(None, "x", "names=a", "names=b") == 2
    assert capsys.readouterr().err == (
        "error: names is given twice: 'a' and 'b'. It takes several at once as names=A,B.\n"
    )
    assert run(None) == 2
    assert capsys.readouterr().err.startswith("error: directory is missing: set directory=...\n")


def test_help_lists_every_key_with_its_text(capsys):
    assert run(RunError("not reached"), "--help") == 0
    assert capsys.readouterr().out == (
        "usage: python -m check [key=value ...] [--help [SECTION]] [--print] [--debug]\n\n"
        "Check a folder.\n\n"
        "  directory (text; required)\n"
        "      What is checked.\n"
        "  depth (whole number; default: 1)\n"
        "      How deep; 1 is the folder itself.\n"
        "  names (list of texts; default: [])\n"
        "  kinds (list of one of few, many; default: [])\n"
    )


def test_help_follows_the_recipe(capsys, schema, recipes):
    def never(config: Config) -> int:
        raise AssertionError

    assert run_command(schema, never, command="toy", argv=["--help"], recipes=recipes) == 0
    out = capsys.readouterr().out
    assert "recipes: contrast_small, distil_small\n" in out
    assert "  method.name: one of distil, contrast; its keys: --help with recipe= or method.name=\n" in out
    assert "  augment.NAME.size (whole number; required)\n      Side in pixels.\n" in out
    assert "num_prototypes" not in out
    assert run_command(schema, never, command="toy", argv=["-h", "recipe=distil_small"], recipes=recipes) == 0
    out = capsys.readouterr().out
    assert "  method.num_prototypes (whole number, above 1; default: 64)\n      Width of the output.\n" in out
    assert "  method.freeze_for (duration; default: 1ep)\n" in out
    keys = f"      One value, or the keys {', '.join(f'.{name}' for name in Schedule.model_fields)}.\n"
    assert f"  optim.lr (schedule; required)\n      Learning rate.\n{keys}" in out
    assert run_command(schema, never, command="toy", argv=["--help", "recipe=x"], recipes=recipes) == 2


def helped(schema: type[Config], recipes: Path, *argv: str) -> int:
    return run_command(schema, lambda config: 1, command="toy", argv=["--help", *argv], recipes=recipes)


def test_help_shows_one_section_with_types_values_and_ranges(capsys, schema, recipes):
    assert helped(schema, recipes, "optim") == 0
    assert capsys.readouterr().out == (
        "  optim.name (one of adamw, sgd; required)\n"
        "  optim.lr (schedule; required)\n"
        "      Learning rate.\n"
        f"      One value, or the keys {', '.join(f'.{name}' for name in Schedule.model_fields)}.\n"
        "  optim.betas (2 numbers; default: [0.9, 0.999])\n"
        "  optim.clip_norm (number or null, above 0; default: null)\n"
    )


def test_help_shows_a_key_of_a_group_or_of_a_schedule(capsys, schema, recipes):
    assert helped(schema, recipes, "recipe=distil_small", "augment.global.size", "optim.lr") == 0
    keys = re.findall(r"^  (\S+) \(", capsys.readouterr().out, re.MULTILINE)
    assert keys == ["augment.NAME.size", "optim.lr", *(f"optim.lr.{name}" for name in Schedule.model_fields)]
    assert helped(schema, recipes, "optim.lr.factor") == 0
    assert capsys.readouterr().out.startswith("  optim.lr.factor (number, above 0 and at most 1; default: 0.1)\n")


def test_help_of_an_unknown_section_is_told_with_the_nearest(capsys, schema, recipes):
    assert helped(schema, recipes, "optm") == 2
    assert capsys.readouterr().err == "error: There is no key or section 'optm'. Did you mean 'optim'?\n"
    assert run(None, "--help", "some/where") == 0  # a value of a positional key is no section
    assert run(None, "--help", "depth") == 0
    text = "  depth (whole number; default: 1)\n      How deep; 1 is the folder itself.\n"
    lists = "  names (list of texts; default: [])\n  kinds (list of one of few, many; default: [])\n"
    assert capsys.readouterr().out.endswith(f"\n{text}{lists}{text}")


def test_print_tells_below_the_settings_what_a_run_would_refuse(capsys):
    def check(config: CheckConfig) -> None:
        if config.depth > 2:
            raise ConfigError("depth must be 2 at most.")

    def shown(*argv: str) -> int:
        return run_command(
            CheckConfig, lambda config: 1, command="", argv=["--print", "directory=x", *argv], check=check
        )

    assert shown("depth=2") == 0
    assert capsys.readouterr().err == ""
    assert shown("depth=3") == 2
    found = capsys.readouterr()
    assert "depth: 3" in found.out
    assert found.err == "error: depth must be 2 at most.\n"


def test_print_shows_what_a_run_would_use(capsys, schema, recipes, tmp_path):
    argv = ["--print", "recipe=distil_small", "optim.lr=1e-3", "output=5e-4"]
    assert run_command(schema, lambda config: 1, command="toy", argv=argv, recipes=recipes) == 0
    out = capsys.readouterr().out
    config = validate(schema, read_yaml(out, where="out"))
    assert (config.optim.lr.value, config.output) == (1e-3, Path("5e-4"))
    # and it is a recipe itself
    (tmp_path / "printed.yaml").write_text(out)
    argv = ["--print", f"recipe={tmp_path / 'printed.yaml'}"]
    assert run_command(schema, lambda config: 1, command="toy", argv=argv, recipes=recipes) == 0
    again = capsys.readouterr().out
    values, told = (
        [line for line in text.splitlines() if line.startswith("#") == comments][not comments :]
        for text, comments in ((again, False), (out, True))
    )
    assert values == [line for line in out.splitlines() if not line.startswith("#")][1:]
    assert told[0] == "# from the command line: optim.lr, output"
    assert told[1].startswith("# from recipe distil_small: method.name, ")
    assert told[-1].startswith("# all else: defaults")

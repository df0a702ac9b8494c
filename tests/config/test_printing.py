"""Names from outside reach the terminal escaped and shortened, whoever prints them."""

from __future__ import annotations

import io
import warnings

import pytest

from ssl_pipeline.config import Config, ConfigError, bar_interval, run_command
from ssl_pipeline.config.printing import LONGEST_LINE, printable
from ssl_pipeline.run.tracking import ProgressLines

EVIL = "part\x1b]0;owned\x07\n\r\x9b2J\u202egpj.\u2028\ud800\x00.tar"
TAMED = r"part\x1b]0;owned\x07\n\r\x9b2J\u202egpj.\u2028\ud800\x00.tar"


class Nothing(Config):
    """Nothing."""


def run(error: Exception | None, *argv: str) -> int:
    def fail(config: Nothing) -> int:
        if error is not None:
            raise error
        warnings.warn(f"Odd: {EVIL}", stacklevel=1)
        return 0

    return run_command(Nothing, fail, command="check", argv=argv)


def test_what_a_terminal_obeys_is_escaped_and_letters_stay():
    assert printable(EVIL) == TAMED
    assert printable("größe 写真 😀 C:\\x") == "größe 写真 😀 C:\\x"


@pytest.mark.parametrize("length", [LONGEST_LINE, LONGEST_LINE + 1, 100_000])
def test_a_long_line_keeps_its_start_and_its_advice(length):
    advice = " Try another."
    shown = printable("a" * (length - len(advice)) + advice)
    assert len(shown) == LONGEST_LINE
    assert shown.startswith("aaa")
    assert shown.endswith(advice)
    assert (" [...] " in shown) == (length > LONGEST_LINE)


@pytest.mark.parametrize("argv", [(), ("--debug",)])
@pytest.mark.parametrize("kind", [ConfigError, OSError, ValueError])
def test_errors_are_escaped(capsys, kind, argv):
    run(kind(f"Cannot read '{EVIL}'."), *argv)
    printed = capsys.readouterr().err
    assert (TAMED if kind is not ValueError else r"Cannot read 'part\x1b]0;owned\x07") in printed
    assert not set(printed) & {"\x1b", "\r", "\x9b", "\u202e", "\u2028"}
    assert argv or printed.count("\n") == 1


def test_mistakes_in_arguments_have_a_line_each_and_are_escaped(capsys):
    assert run(None, "a\x1b[2J=1", "b\n=1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(r"error: Unknown key 'a\x1b[2J'.")
    assert len(lines) == 3, "two mistakes, and where help is"


def test_warnings_are_escaped(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    # recorded here: a report of pytest cannot travel with a lone surrogate in it
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("default")
        assert run(None) == 0
        assert warnings.formatwarning(f"Odd: {EVIL}", UserWarning, "x.py", 3) == f"warning: Odd: {TAMED}\n"


def test_progress_lines_are_escaped():
    stream = io.StringIO()
    ProgressLines(stream, total_steps=1, first_step=0).message(f"Reading {EVIL}")
    assert stream.getvalue() == f"Reading {TAMED}\n"


def test_a_bar_in_a_file_is_shown_now_and_then(monkeypatch):
    assert bar_interval() >= 10  # the stream of a test is no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert bar_interval() < 1

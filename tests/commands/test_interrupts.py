"""Ctrl-C before a command takes it is a word, and any other end keeps its traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["eval", "data_tools"])
def test_an_interrupt_while_a_command_is_imported_is_a_word(package):
    taken = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where a shell ignores it
    done = run(f"{taken}; import {package}, os; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)")
    assert done.stderr == "interrupted\n"
    assert done.returncode == -signal.SIGINT


def test_of_the_console_command_too():
    code = "import sys\nfrom ssl_pipeline.commands.console import main\nsys.argv[1:] = ['-h']\nmain()\n"
    done = run(f"{code}raise KeyboardInterrupt")
    assert done.stderr == "interrupted\n"


def test_another_error_keeps_its_traceback():
    done = run("import eval; 1 / 0")
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert done.returncode == 1

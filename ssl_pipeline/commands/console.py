"""The console command of an installed package: `ssl-pipeline COMMAND key=value ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from ssl_pipeline.config import nearest

PROGRAM = "ssl-pipeline"
COMMANDS = {
    "pretrain": "ssl_pipeline.commands.start",
    "knn": "ssl_pipeline.eval.knn",
    "linear": "ssl_pipeline.eval.linear",
    "table": "ssl_pipeline.eval.table",
    "doctor": "ssl_pipeline.eval.doctor",
    "suite": "ssl_pipeline.eval.suite",
    "report": "ssl_pipeline.commands.report",
    "embed": "ssl_pipeline.commands.embed",
    "compare": "ssl_pipeline.commands.compare",
    "export": "ssl_pipeline.eval.export",
    "make-shards": "ssl_pipeline.data_tools.make_shards",
    "check-shards": "ssl_pipeline.data_tools.check_shards",
    "split-labels": "ssl_pipeline.data_tools.split_labels",
}
"""The module of each command, imported when it is called."""


def main() -> int:
    """Run the command that the first argument names; returns the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        return import_module(COMMANDS[name]).command(f"{PROGRAM} {name}")
    print(f"usage: {PROGRAM} COMMAND [key=value ...] [--help]\n\ncommands: {', '.join(COMMANDS)}")
    if name in ("--help", "-h"):
        return 0
    print(f"error: There is no command '{name}'.{nearest(name, list(COMMANDS))}", file=sys.stderr)
    return 2

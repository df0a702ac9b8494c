"""The console command of an installed package: `ssl-pipeline COMMAND key=value ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from ssl_pipeline import __version__
from ssl_pipeline.commands.interrupts import answer_interrupts
from ssl_pipeline.config import nearest

PROGRAM = "ssl-pipeline"
COMMANDS = {
    "pretrain": "ssl_pipeline.commands.start",
    "finetune": "ssl_pipeline.commands.finetune",
    "knn": "ssl_pipeline.eval.knn",
    "linear": "ssl_pipeline.eval.linear",
    "few-shot": "ssl_pipeline.eval.few_shot",
    "retrieval": "ssl_pipeline.eval.retrieval",
    "label-free": "ssl_pipeline.eval.label_free",
    "clustering": "ssl_pipeline.eval.clustering",
    "dense": "ssl_pipeline.eval.dense",
    "robustness": "ssl_pipeline.eval.robustness",
    "table": "ssl_pipeline.eval.table",
    "doctor": "ssl_pipeline.eval.doctor",
    "suite": "ssl_pipeline.eval.suite",
    "report": "ssl_pipeline.commands.report",
    "classifier": "ssl_pipeline.eval.classifier",
    "embed": "ssl_pipeline.commands.embed",
    "predict": "ssl_pipeline.commands.predict",
    "compare": "ssl_pipeline.commands.compare",
    "self-training": "ssl_pipeline.commands.self_training",
    "export": "ssl_pipeline.eval.export",
    "make-shards": "ssl_pipeline.packing.make_shards",
    "check-shards": "ssl_pipeline.data_tools.check_shards",
    "split-labels": "ssl_pipeline.data_tools.split_labels",
    "deduplicate": "ssl_pipeline.commands.deduplicate",
    "curate": "ssl_pipeline.commands.curate",
    "pseudo-label": "ssl_pipeline.data_tools.pseudo_label",
    "recipes": "ssl_pipeline.commands.recipes",
    "check-install": "ssl_pipeline.commands.check_install",
}
"""The module of each command, imported when it is called."""


def main() -> int:
    """Run the command that the first argument names; returns the exit code."""
    answer_interrupts()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        return import_module(COMMANDS[name]).command(f"{PROGRAM} {name}")
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    print(f"usage: {PROGRAM} COMMAND [key=value ...] [--help] | --version\n\ncommands: {', '.join(COMMANDS)}")
    if name in ("--help", "-h"):
        return 0
    print(f"error: There is no command '{name}'.{nearest(name, list(COMMANDS))}", file=sys.stderr)
    return 2

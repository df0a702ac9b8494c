"""The start of `pretrain.py`: what must not wait for torch, whose import takes seconds."""

from __future__ import annotations

import sys

from ssl_pipeline.run.launcher import watch_launcher


def command(name: str = "pretrain.py") -> int:
    """The command line, called `name`; returns the exit code."""
    watch_launcher()
    from ssl_pipeline.commands import pretrain  # torch, timm, accelerate

    return pretrain.main(name)


if __name__ == "__main__":
    sys.exit(command())

"""`python -m eval.self_training key=value ...`: teacher, labels, student, round by round, in one table."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.self_training import command

if __name__ == "__main__":
    sys.exit(command())

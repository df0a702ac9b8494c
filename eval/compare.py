"""`python -m eval.compare key=value ...`: several recipes and seeds in one table."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.compare import command

if __name__ == "__main__":
    sys.exit(command())

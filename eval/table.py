"""`python -m eval.table key=value ...`: the reports of a run in one table."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.table import command

if __name__ == "__main__":
    sys.exit(command())

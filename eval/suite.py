"""`python -m eval.suite key=value ...`: all measures of a backbone from one feature pass."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.suite import command

if __name__ == "__main__":
    sys.exit(command())

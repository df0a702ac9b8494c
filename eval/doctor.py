"""`python -m eval.doctor key=value ...`: what goes wrong in a run, by its metrics."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.doctor import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m eval.linear key=value ...`: linear-probe accuracy of a backbone's features."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.linear import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m eval.robustness key=value ...`: accuracy of a backbone on corrupted images."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.robustness import command

if __name__ == "__main__":
    sys.exit(command())

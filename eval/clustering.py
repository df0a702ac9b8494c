"""`python -m eval.clustering key=value ...`: how well clusters of features agree with classes."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.clustering import command

if __name__ == "__main__":
    sys.exit(command())

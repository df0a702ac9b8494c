"""`python -m eval.retrieval key=value ...`: how well images of the same class are found by a backbone."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.retrieval import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m eval.knn key=value ...`: k-NN accuracy of a backbone's features."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.knn import command

if __name__ == "__main__":
    sys.exit(command())

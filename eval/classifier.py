"""`python -m eval.classifier run=DIR test=SHARDS`: the accuracy of the classifier that a run has learnt."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.classifier import command

if __name__ == "__main__":
    sys.exit(command())

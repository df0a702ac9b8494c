"""`python -m eval.classifier key=value ...`: accuracy and calibration of a run's own classifier."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.classifier import command

if __name__ == "__main__":
    sys.exit(command())

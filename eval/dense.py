"""`python -m eval.dense key=value ...`: segmentation from a backbone's patch tokens."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.dense import command

if __name__ == "__main__":
    sys.exit(command())

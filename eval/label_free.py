"""`python -m eval.label_free key=value ...`: what features tell of a backbone without labels."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.label_free import command

if __name__ == "__main__":
    sys.exit(command())

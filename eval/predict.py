"""`python -m eval.predict key=value ...`: labels and probabilities of images, a row for each."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.predict import command

if __name__ == "__main__":
    sys.exit(command())

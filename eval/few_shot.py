"""`python -m eval.few_shot key=value ...`: accuracy of a backbone from a few labelled images."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.few_shot import command

if __name__ == "__main__":
    sys.exit(command())

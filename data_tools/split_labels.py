"""`python -m data_tools.split_labels key=value ...`: a few labelled images out of a set."""

from __future__ import annotations

import sys

from ssl_pipeline.data_tools.split_labels import command

if __name__ == "__main__":
    sys.exit(command())

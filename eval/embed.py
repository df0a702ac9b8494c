"""`python -m eval.embed key=value ...`: features of images, a row for each."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.embed import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m eval.report run=DIR`: a run as one page."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.report import command

if __name__ == "__main__":
    sys.exit(command())

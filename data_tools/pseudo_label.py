"""`python -m data_tools.pseudo_label key=value ...`: a run's classifier labels images for another run."""

from __future__ import annotations

import sys

from ssl_pipeline.data_tools.pseudo_label import command

if __name__ == "__main__":
    sys.exit(command())

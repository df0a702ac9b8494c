"""`python -m eval.export run=DIR output=DIR`: a backbone of a run as files that timm reads."""

from __future__ import annotations

import sys

from ssl_pipeline.eval.export import command

if __name__ == "__main__":
    sys.exit(command())

"""`python pretrain.py recipe=NAME [key=value ...]`: pretrain a backbone."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.start import command

if __name__ == "__main__":
    sys.exit(command())

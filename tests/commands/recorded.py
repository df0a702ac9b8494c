"""`python -m tests.commands.recorded FILE ARGV`: pretrain.py that notes the images of each micro-batch in files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.runs import Happening, command

if __name__ == "__main__":
    prefix, *argv = sys.argv[1:]
    restart = f"{prefix}-of-{os.environ['WORLD_SIZE']}"
    command(argv, Happening(record=Path(restart)))

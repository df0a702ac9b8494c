"""`python -m ssl_pipeline COMMAND key=value ...`, also under `accelerate launch -m`: the console command."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.console import main

if __name__ == "__main__":
    sys.exit(main())

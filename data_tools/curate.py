"""`python -m data_tools.curate key=value ...`: the images of shards that are like some, or a balanced part."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.curate import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m data_tools.deduplicate key=value ...`: near duplicates are left out, without a copy of the shards."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.deduplicate import command

if __name__ == "__main__":
    sys.exit(command())

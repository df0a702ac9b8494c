"""`python -m data_tools.make_shards key=value ...`: shards from a folder, a zip or a known data set."""

from __future__ import annotations

import sys

from ssl_pipeline.packing.make_shards import command

if __name__ == "__main__":
    sys.exit(command())

"""`python -m data_tools.check_shards key=value ...`: shards verified from end to end."""

from __future__ import annotations

import sys

from ssl_pipeline.data_tools.check_shards import command

if __name__ == "__main__":
    sys.exit(command())

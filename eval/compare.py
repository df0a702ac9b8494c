"""`python -m eval.compare key=value ...`: several recipes and seeds in one table."""

import sys

from ssl_pipeline.eval.compare import command

if __name__ == "__main__":
    sys.exit(command())

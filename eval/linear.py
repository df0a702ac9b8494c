"""`python -m eval.linear key=value ...`: linear-probe accuracy of a backbone's features."""

import sys

from ssl_pipeline.eval.linear import command

if __name__ == "__main__":
    sys.exit(command())

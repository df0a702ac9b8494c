"""`accelerate launch pretrain.py recipe=NAME [key=value ...]`: pretrain a backbone."""

import sys

from ssl_pipeline.commands.start import command

if __name__ == "__main__":
    sys.exit(command())

"""`python finetune.py weights=RUN train=SHARDS test=SHARDS [key=value ...]`: fine-tune a backbone."""

from __future__ import annotations

import sys

from ssl_pipeline.commands.finetune import command

if __name__ == "__main__":
    sys.exit(command())

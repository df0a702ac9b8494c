"""What a page calls places: it is made to be shared, and full paths reveal the machine and its user."""

from __future__ import annotations

import os
import re

PART = r"""[^\s/'"`<>|,;()\[\]{}]"""
FULL_PATH = re.compile(rf"(?<![\w./:~-])/(?:{PART}+/)*({PART}+/{PART}+)/?")


def shortened(words: str) -> str:
    """Words without full paths: `~` for the home directory, of others the last two names, `.../caltech/train`."""
    home = os.environ.get("HOME", "").rstrip("/")
    if home:
        words = re.sub(rf"(?<![\w./:~-]){re.escape(home)}(?![\w.-])", "~", words)
    return FULL_PATH.sub(r".../\1", words)

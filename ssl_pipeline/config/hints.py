"""What to write instead, where other programs use another word: True, None, fp32, learning_rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from ssl_pipeline.config.base import nearest
from ssl_pipeline.config.schema import sections_in, tags_of

BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
NONE = {"none", "nil", "null"}
CHOICES = {"fp32": "no", "float32": "no", "32": "no", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
KEYS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "num_workers": "workers",
    "bs": "batch_size",
    "img_size": "size",
    "image_size": "size",
    "tau": "temperature",
    "max_epochs": "epochs",
    "max_steps": "steps",
    "arch": "name",
    "model": "name",
}
"""What other programs call a key -> its name here."""


def like_key(section: str, key: str, known: Sequence[str]) -> str:
    """` Did you mean 'SECTION.KEY'?` for a key of other programs, or the closest known one; else an empty string."""
    if KEYS.get(key) in known:
        return f" Did you mean '{section}{KEYS[key]}'?"
    return nearest(section + key, [section + name for name in known]) if nearest(key, known) else ""


def hint(where: str, annotation: object, got: object, sentence: str) -> str:
    """` Write ...`, to follow the sentence about a value; empty where nothing is known of it."""
    text = str(got).lower()
    if "is a section with" in sentence:
        if (got is False or text in NONE) and takes_none(annotation):
            return f" Write {where}=null."
        named = isinstance(got, str) and any("name" in section.model_fields for section in sections_in(annotation))
        return f" Write {where}.name={got}." if named and text not in NONE else ""
    if text in NONE and isinstance(got, str):
        return " Write null." if takes_none(annotation) else ""
    if "valid boolean" in sentence and text in BOOLEANS:
        return f" Write {BOOLEANS[text]}."
    if "is a section: set" in sentence and any(got in tags_of(section) for section in sections_in(annotation)):
        return f" Write {where}.name={got}."
    choices = re.search(r"must be one of (.*?)\. Got ", sentence)
    if choices and CHOICES.get(text) in choices[1].split(", "):
        return f" Write {CHOICES[text]}."
    return ""


def takes_none(annotation: object) -> bool:
    """Whether null is a value of the key."""
    if get_origin(annotation) is Annotated:
        return takes_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(map(takes_none, get_args(annotation)))
    return annotation in (None, type(None))

"""The start of `finetune.py`, as `start.py` is that of `pretrain.py`: what must not wait for torch."""

from __future__ import annotations

from ssl_pipeline.commands.start import start

OWN_KEYS = ("weights", "train", "test")
BEGIN = """usage: {call} weights=RUN|FILE|TAG train=SHARDS [test=SHARDS] [recipe=NAME] [key=value ...] [--help]

A run's backbone, or weights of timm or from a file, on labelled images (shards, or a folder with class folders):
  {call} weights=runs/photos train=data/train test=data/test
  {call} weights=tf_efficientnet_lite0.in1k train=photos/
  {call} weights=model.safetensors backbone.name=vit_small_patch16_224 train=data/train

Only a classifier, on a frozen backbone:
  {call} weights=runs/photos train=data/train recipe=feature_extraction_small

Every key of pretrain.py works here; the same command resumes. With test= the accuracy on these images is measured
during training and at the end, into OUTPUT/eval/classifier.json."""


def command(name: str = "finetune.py") -> int:
    """The command line, called `name`; returns the exit code."""
    return start(name, how_to_begin, "ssl_pipeline.commands.finetuning", own=OWN_KEYS)


def how_to_begin(name: str) -> str:
    """What a call without arguments shows."""
    return BEGIN.format(call=f"python {name}" if name.endswith(".py") else name)

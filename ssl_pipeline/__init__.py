"""Self-supervised pretraining of image backbones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl_pipeline.backbones import Backbone

__version__ = "0.2.0"
__all__ = ["load"]


def load(run: str | Path, *, step: int | None = None, which: str | None = None) -> Backbone:
    """The backbone of a run, in eval mode: images (B, 3, S, S) -> features (B, embed_dim).

    run: the run's directory. What it exported is loaded, before its end the newest checkpoint.
    step: the optimizer step of one of its checkpoints. which: a backbone of its checkpoints by name, for instance
    "student". `.config` says what it is, `.preprocessing` what it expects of images, and `.transform()` makes an image
    of Pillow into that. Raises ConfigError (a ValueError) if the run has no such backbone.
    """
    from ssl_pipeline.backbones import load_run  # takes seconds: torch and timm

    return load_run(Path(run).expanduser(), which=which, step=step).backbone.eval()

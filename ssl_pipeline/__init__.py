"""Self-supervised pretraining of image backbones.

`pretrain`, `load`, `embed` and `knn` are the commands as functions. Importing this package imports neither torch nor
timm; the first use of one of these names does.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl_pipeline.backbones import Backbone
    from ssl_pipeline.commands.api import Run, embed, knn, pretrain
    from ssl_pipeline.config import ConfigError, RunError

__version__ = "0.2.0"
__all__ = ["ConfigError", "Run", "RunError", "embed", "knn", "load", "pretrain"]

API, SETTINGS = "ssl_pipeline.commands.api", "ssl_pipeline.config"
PLACES = {"ConfigError": SETTINGS, "Run": API, "RunError": SETTINGS, "embed": API, "knn": API, "pretrain": API}
"""Where each name stands that is imported when it is asked for."""


def load(run: str | Path, *, step: int | None = None, which: str | None = None) -> Backbone:
    """The backbone of a run, in eval mode: images (B, 3, S, S) -> features (B, embed_dim).

    run: the run's directory. What it exported is loaded, before its end the newest checkpoint.
    step: the optimizer step of one of its checkpoints. which: a backbone of its checkpoints by name, for instance
    "student". `.config` says what it is, `.preprocessing` what it expects of images, and `.transform()` makes an image
    of Pillow into that. Raises ConfigError (a ValueError) if the run has no such backbone.
    """
    from ssl_pipeline.config import ConfigError

    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise ConfigError(f"step must be the number of optimizer steps of a checkpoint, such as 1000. Got {step!r}.")
    if which is not None and not isinstance(which, str):
        raise ConfigError(f"which must be the name of a backbone, such as 'student'. Got {which!r}.")
    from ssl_pipeline.backbones import load_run  # takes seconds: torch and timm

    return load_run(Path(run).expanduser(), which=which, step=step).backbone.eval()


if not TYPE_CHECKING:  # a type checker would take any name for one of this package

    def __getattr__(name: str) -> object:
        if name not in PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

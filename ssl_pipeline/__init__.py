"""Self-supervised pretraining of image backbones."""

from __future__ import annotations

__version__ = "0.2.0"

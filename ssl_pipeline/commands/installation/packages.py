"""Packages: their versions, what is optional, and whether images can be decoded."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata

import numpy as np
from PIL import Image, features

from ssl_pipeline import __version__
from ssl_pipeline.commands.installation.finding import Finding, reason

NEEDED = {  # what is imported: the package that brings it
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "accelerate": "accelerate",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "pyarrow": "pyarrow",
    "webdataset": "webdataset",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
}
OPTIONAL = {  # what is imported: the extra, and what is missing without it
    "pillow_heif": ("heif", "HEIC photographs are left out"),
    "onnx": ("onnx", "eval.export format=onnx"),
    "transformers": ("huggingface", "format=huggingface is not re-loaded with transformers"),
    "wandb": ("wandb", "wandb=true"),
    "aiohttp": ("remote", "shards over http"),
}
OLDEST = (3, 11)
SIDE = 64  # pixels


def check_versions(needed: Mapping[str, str] = NEEDED) -> Iterator[Finding]:
    """Python, this package and its required dependencies: imported, not only listed."""
    python = platform.python_version()
    if sys.version_info[:2] < OLDEST:
        yield Finding("wrong", "Python", python, f"Python {'.'.join(map(str, OLDEST))} or newer is needed.")
    found, broken = [f"ssl-pipeline {__version__}", f"Python {python}"], []
    for module, package in needed.items():
        try:
            import_module(module)
            found.append(f"{package} {metadata.version(package)}")
        except Exception as error:  # a library that is built for another machine raises whatever it likes
            broken.append((package, reason(error)))
    yield Finding("ok", "packages", ", ".join(found))
    for package, why in broken:
        yield Finding("wrong", package, f"cannot be imported ({why})", f"pip install --upgrade {package}")


def check_optional(optional: Mapping[str, tuple[str, str]] = OPTIONAL) -> Iterator[Finding]:
    """Extras that are not installed, in one line: none of them is needed."""
    missing = []
    for module, (extra, without) in optional.items():
        try:
            import_module(module)
        except Exception:
            missing.append(f"{extra} ({without})")
    if missing:
        told = "; ".join(missing)
        yield Finding("ok", "extras that are not installed", told, "pip install 'ssl-pipeline[EXTRA]' brings one.")


def check_decoders() -> Iterator[Finding]:
    """Each format is written and read again; JPEG by libjpeg-turbo directly, where that is installed."""
    from ssl_pipeline.data import decode

    row = np.linspace(0, 255, SIDE).astype(np.uint8)
    ramp = np.stack([np.tile(row, (SIDE, 1))] * 3, axis=-1)
    read, broken = [], []
    for name in decode.FORMATS:
        file = io.BytesIO()
        try:
            Image.fromarray(ramp).save(file, name)
            found = decode.decode_image(file.getvalue())
            if np.abs(found.astype(int) - ramp).max() > 40:  # far above what JPEG loses of a ramp
                raise ValueError("the pixels are not those that were written")
            read.append(name)
        except Exception as error:
            broken.append((name, reason(error)))
    yield Finding("ok" if not broken else "note", "image decoders", ", ".join(read) or "none")
    for name, why in broken:
        yield Finding("wrong", f"{name} images", why, "pip install --force-reinstall pillow simplejpeg")
    if decode.decode_jpeg is None:
        told = "simplejpeg is not installed: JPEG is read by Pillow, which takes 1.2 to 6 times as long"
        yield Finding("note", "JPEG", told, "pip install simplejpeg")
    if not features.check("libjpeg_turbo"):
        yield Finding("note", "Pillow", "built without libjpeg-turbo: JPEG is read slowly", "pip install -U pillow")

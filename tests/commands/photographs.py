"""Photographs of one colour each, in class folders, one of which has a name that is not ASCII."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

COLOURS = {"cat/red.png": (200, 30, 30), "cat/white.png": (250, 250, 250), "été/blue.png": (20, 20, 220)}


def save_photographs(folder: Path) -> Path:
    """The files of COLOURS in a folder."""
    for name, colour in COLOURS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), colour).save(path)
    return folder

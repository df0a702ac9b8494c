"""The wheel: the package with its commands and recipes, and nothing else; it works far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from ssl_pipeline.config import RECIPES, recipe_files

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel would put into site-packages."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    unpacked = tmp_path_factory.mktemp("installed")
    for name in ("ssl_pipeline", "recipes", "eval", "data_tools", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pretrain.py", "finetune.py"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_nothing_but_the_package_is_installed(installed: Path):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"ssl_pipeline"}
    (script,) = installed.glob("*.dist-info/entry_points.txt")
    assert "ssl-pipeline = ssl_pipeline.commands.console:main" in script.read_text()


def test_type_checkers_are_told_that_it_is_typed(installed: Path):
    assert (installed / "ssl_pipeline" / "py.typed").is_file()


def test_it_brings_the_recipes(installed: Path, tmp_path: Path):
    packed = recipe_files(installed / "ssl_pipeline" / "recipes")
    assert packed.keys() == recipe_files(RECIPES).keys()
    command = [sys.executable, "-m", "ssl_pipeline.commands.start", "--print", "recipe=digits_dino"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("recipe: digits_dino\n"), done.stderr
    assert list(tmp_path.iterdir()) == []

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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout without its files of git."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("ssl_pipeline", "recipes", "eval", "data_tools", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pretrain.py", "finetune.py"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel would put into site-packages."""
    unpacked = tmp_path_factory.mktemp("installed")
    with ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a fresh environment with the wheel, in which all else is what this interpreter has."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    return home / "bin"


def called(directory: Path, *command: str | Path) -> str:
    """What a command prints in a directory that is no checkout; it must end well."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=directory, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_a_quickstart_works_without_the_checkout(environment: Path, tmp_path: Path):
    command, python = environment / "ssl-pipeline", environment / "python"
    place = called(tmp_path, python, "-c", "import ssl_pipeline; print(ssl_pipeline.__file__)")
    assert Path(place.strip()).is_relative_to(environment.parent)
    for split in ("train", "test"):
        called(tmp_path, command, "make-shards", "source=digits", f"split={split}", f"output=data/digits/{split}")
    short = ("train.epochs=null", "train.steps=2", "data.workers=0", "train.hang_timeout=0", "knn=null")
    ended = called(tmp_path, command, "pretrain", "recipe=digits_dino", "output=run", *short)
    assert "Evaluate with: ssl-pipeline knn run=run" in ended
    measured = called(
        tmp_path, command, "knn", "run=run", "train=data/digits/train", "test=data/digits/test", "workers=0"
    )
    assert "top-1" in measured
    assert "digits_dino" in called(tmp_path, command, "recipes", "digits")
    assert "This installation can train." in called(tmp_path, command, "check-install")


def test_accelerate_starts_the_module(environment: Path, tmp_path: Path):
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    alone = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ssl_pipeline")
    shown = called(
        tmp_path, environment / "python", *launch, *alone, "pretrain", "recipe=digits_dino", "--print", "train.epochs=3"
    )
    assert "epochs: 3" in shown

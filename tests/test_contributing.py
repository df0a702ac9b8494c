"""What CONTRIBUTING.md says of a new method, done as it says in a copy of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_shards

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOSS, METHOD, RECIPE = (
    "ssl_pipeline/losses/spectral.py",
    "ssl_pipeline/methods/spectral.py",
    "recipes/digits/digits_spectral.yaml",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the method of CONTRIBUTING.md, its loss, its recipe and its word in METHODS."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("ssl_pipeline", "eval", "data_tools", "benchmarks", "tests", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "pretrain.py", "finetune.py"):
        shutil.copy(ROOT / name, copy)
    files = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert files.keys() == {LOSS, METHOD, RECIPE}
    for name, content in files.items():
        assert not (copy / name).exists(), name
        (copy / name).write_text(content)
    methods = copy / "ssl_pipeline/methods/__init__.py"
    head, word = re.subn(r"^(METHODS\b[^)]*?),?\s*\)", r"\1, Spectral)", methods.read_text(), flags=re.MULTILINE)
    assert word == 1
    above = "from ssl_pipeline.methods.simsiam import SimSiam\n"
    assert above in head
    methods.write_text(head.replace(above, f"{above}from ssl_pipeline.methods.spectral import Spectral\n"))
    return copy


def run(checkout: Path, *arguments: str) -> str:
    """What this interpreter prints in the copy; it must end well."""
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_keeps_the_contract(checkout: Path):
    contract = ("tests/methods/test_contract.py", "tests/test_distributed.py")
    passed = re.search(r"(\d+) passed", run(checkout, "-m", "pytest", "-v", *contract, "-k", "spectral"))
    assert passed
    assert int(passed[1]) >= 12


def test_its_imports_go_downwards(checkout: Path):
    run(checkout, "-m", "pytest", "tests/test_layers.py")


def test_its_recipe_trains(checkout: Path, tmp_path: Path):
    shards = write_shards(tmp_path / "shards", (16,))
    settings = (f"data.shards={shards}", "data.batch_size=8", "train.steps=2")
    run(checkout, "pretrain.py", "recipe=digits_spectral", f"output={tmp_path / 'run'}", *settings)
    assert (tmp_path / "run" / "backbone.safetensors").is_file()


def test_its_files_have_the_house_style(checkout: Path):
    run(checkout, "-m", "ruff", "check", LOSS, METHOD)
    run(checkout, "-m", "ruff", "format", "--check", LOSS, METHOD)

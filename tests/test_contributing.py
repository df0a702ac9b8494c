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
BLOCK = re.compile(r"\*\*([\w/]+\.\w+)\*\*:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOSS, METHOD, RECIPE = (
    "ssl_pipeline/losses/spectral.py",
    "ssl_pipeline/methods/spectral.py",
    "recipes/digits/digits_spectral.yaml",
)
METHODS, CONTROLS = "ssl_pipeline/methods/__init__.py", "tests/test_distributed.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all that the page says of a new method, in the page's words."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("ssl_pipeline", "eval", "data_tools", "benchmarks", "tests", "recipes", "docs", ".ci"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, copy)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    files = dict(BLOCK.findall(page))
    assert files.keys() == {LOSS, METHOD, RECIPE}
    for name, content in files.items():
        assert not (copy / name).exists(), name
        (copy / name).write_text(content)
    text = (copy / METHODS).read_text()
    head, word = re.subn(r"^(METHODS\b[^)]*?),?\s*\)", r"\1,\n    Spectral,\n)", text, flags=re.MULTILINE)
    assert word == 1
    above = "from ssl_pipeline.methods.softmatch import SoftMatch\n"
    assert above in head
    (copy / METHODS).write_text(head.replace(above, f"{above}from ssl_pipeline.methods.spectral import Spectral\n"))
    (control,) = re.findall(r"`(\(\"spectral\", \"[\w ]+\"\),)`", page)
    before, begin, after = (copy / CONTROLS).read_text().partition("CONTROLS = [\n")
    (copy / CONTROLS).write_text(f"{before}{begin}    {control}\n{after}")
    run(copy, "docs/generated.py")
    return copy


def run(checkout: Path, *arguments: str) -> str:
    """What this interpreter prints in the copy; it must end well."""
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(checkout: Path, *arguments: str) -> int:
    """How many tests pass in the copy; none may fail."""
    found = re.search(r"(\d+) passed", run(checkout, "-m", "pytest", "-v", *arguments))
    assert found
    return int(found[1])


def test_the_method_keeps_the_contract(checkout: Path):
    chosen = "spectral or every_method_has_a_control"
    assert passed(checkout, "tests/methods/test_contract.py", "tests/test_distributed.py", "-k", chosen) >= 14


def test_its_control_is_noticed(checkout: Path):
    assert passed(checkout, "tests/test_distributed.py", "-k", "test_a_wrong_gradient_is_noticed and spectral") == 1


def test_its_recipe_is_one_of_the_recipes(checkout: Path):
    tests = ("tests/test_recipes.py", "tests/commands/test_recipe_headers.py")
    assert passed(checkout, *tests, "-k", "digits_spectral") >= 6
    told = run(checkout, "-m", "ssl_pipeline", "recipes", "digits_spectral")
    assert "Spectral contrastive loss, a small ResNet on scikit-learn's digits" in told


def test_tables_and_pages_are_right_with_it(checkout: Path):
    passed(checkout, "tests/docs/test_generated.py", "tests/docs/test_site.py", "tests/test_documents.py")
    row = next(line for line in (checkout / "docs/methods.md").read_text().splitlines() if "| `spectral` |" in line)
    assert all(part in row for part in ("`spectral_loss`", "`view` x 2", "`digits_spectral`"))


def test_its_imports_go_downwards(checkout: Path):
    run(checkout, "-m", "pytest", "tests/test_layers.py")


def test_its_recipe_trains(checkout: Path, tmp_path: Path):
    shards = write_shards(tmp_path / "shards", (16,))
    settings = (f"data.shards={shards}", "data.batch_size=8", "train.steps=2")
    run(checkout, "pretrain.py", "recipe=digits_spectral", f"output={tmp_path / 'run'}", *settings)
    assert (tmp_path / "run" / "backbone.safetensors").is_file()


def test_the_doctor_finds_nothing_in_its_healthy_run(checkout: Path):
    run(checkout, "-m", "tests.run.doctor.record", "healthy_spectral")
    assert passed(checkout, "tests/run/doctor/test_recorded.py", "-k", "spectral or most_methods") >= 3


def test_its_files_have_the_house_style(checkout: Path):
    run(checkout, "-m", "ruff", "check", LOSS, METHOD, METHODS, CONTROLS)
    run(checkout, "-m", "ruff", "format", "--check", LOSS, METHOD, METHODS, CONTROLS)

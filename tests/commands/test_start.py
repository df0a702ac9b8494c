"""What `pretrain.py` says before torch is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ssl_pipeline.commands.start import how_to_begin
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.packing.make_shards import MakeShards

ROOT = Path(__file__).parents[2]
START = """
import sys
from ssl_pipeline.commands.start import command
code = command()
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.exit(code)
"""


def started(*argv: str, code: str = START) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_call_without_arguments_shows_how_to_begin():
    shown = started()
    assert (shown.returncode, shown.stderr) == (2, "")
    assert "python pretrain.py recipe=digits_dino\n" in shown.stdout
    assert shown.stdout.rstrip().endswith("photos_small; python -m ssl_pipeline recipes lists all of them")


@pytest.mark.parametrize("name", ["pretrain.py", "ssl-pipeline pretrain"])
def test_the_commands_that_it_shows_are_commands(name):
    lines = [line.split() for line in how_to_begin(name).splitlines() if line.startswith("  ")]
    for line in lines:
        arguments = [word for word in line if "=" in word]
        if "recipe=" in " ".join(arguments):
            assert " ".join(line).startswith("python pretrain.py" if name == "pretrain.py" else name)
            assert list(RECIPES.rglob(f"{arguments[0].removeprefix('recipe=')}.yaml"))
        elif arguments[0].startswith("images="):
            assert " ".join(line).startswith("python pretrain.py" if name == "pretrain.py" else name)
        else:
            load(MakeShards, arguments)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["recipe=dino_vits61"], "error: No recipe 'dino_vits61'. Did you mean 'dino_vits16'?"),
        (["recipe=digits_dino", "--output", "x"], "error: '--output x' is not of the form key=value. Try output=x."),
        (["docs"], "error: 'docs' is not of the form key=value. Try images=docs."),
        (["--lr", "3"], "error: '--lr 3' is not of the form key=value. Try lr=3."),
        (["recipe=dino_vits16", "recipe=digits_dino"], "error: recipe= is given 2 times"),
        (["imags=photos/"], "error: Unknown key 'imags'. Did you mean 'images'?\nSee: pretrain.py --help\n"),
        (["recipe=dino_vits16", "optim.lr.warmpu=3"], "error: Unknown key 'optim.lr.warmpu'. Did you mean"),
        (
            ["recipe=dino_vits16", "optim.lr.value=abc", "data.batch_size=-3"],
            "error: optim.lr.value must be a valid number. Got 'abc'.\ndata.batch_size must be at least 1. Got -3.\n",
        ),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(argv, sentence):
    refused = started(*argv)
    assert refused.returncode == 2
    assert refused.stderr.startswith(sentence)
    assert "Loading" not in refused.stderr


def test_ctrl_c_while_images_are_packed_is_one_line():
    stopped = (
        "import sys, types\ndef main(name):\n    raise KeyboardInterrupt\n"
        "sys.modules['ssl_pipeline.commands.pretrain'] = types.SimpleNamespace(main=main)\n"
    )
    refused = started("images=photos", code=stopped + START)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in refused.stderr


def test_the_wait_for_torch_is_announced():
    code = "import sys\nsys.modules['ssl_pipeline.commands.pretrain'] = None\n" + START
    announced = started("recipe=digits_dino", code=code)
    assert announced.stderr.startswith("Loading torch and timm: a few seconds ...\n")

"""The heads of recipes are read as people read them, and every shipped one has what lists and tables show."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.commands.recipe_headers import RecipeHeader, read_header
from ssl_pipeline.config import RECIPES, ConfigError, recipe_files


def written(tmp_path: Path, text: str) -> RecipeHeader:
    path = tmp_path / "imagenet" / "one.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return read_header(path)


def test_a_head_is_taken_apart(tmp_path):
    head = written(
        tmp_path,
        "# DINO ViT-S/16, ImageNet-1k: the official run (README,\n"
        "#   main_dino.py)\n"
        "# Cost theirs: 8 GPUs, 1.75 days.   Theirs: k-NN 69.3 % (v1.0).   Ours: k-NN 68.9 %, time 2 days.\n"
        "# accelerate launch pretrain.py recipe=one\n"
        "# Differences: Theirs: not this one.\n"
        "seed: 0  # Ours: nor this\n",
    )
    assert head == RecipeHeader(
        name="one",
        folder="imagenet",
        what="DINO ViT-S/16, ImageNet-1k",
        source="the official run (README, main_dino.py)",
        cost="8 GPUs, 1.75 days",
        theirs="k-NN 69.3 % (v1.0)",
        ours="k-NN 68.9 %, time 2 days",
    )


@pytest.mark.parametrize(
    "ours", ["k-NN -, linear -, time -.", "classifier -, k-NN -, time -.", "not measured yet.", "-"]
)
def test_what_was_not_measured_is_a_dash(tmp_path, ours):
    head = written(tmp_path, f"# A network\n# Theirs: none.   Ours: {ours}\nseed: 0\n")
    assert (head.ours, head.cost, head.source) == ("-", "-", "-")


def test_a_recipe_without_a_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must begin with comments"):
        written(tmp_path, "seed: 0\n")


@pytest.mark.parametrize("name", recipe_files(RECIPES))
def test_every_shipped_head_says_what_it_is_and_whose(name):
    head = read_header(recipe_files(RECIPES)[name])
    assert head.what
    assert head.source != "-"
    assert head.folder != "imagenet" or head.cost != "-"
    assert "README" not in head.ours

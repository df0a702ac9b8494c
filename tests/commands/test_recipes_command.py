"""`recipes` lists what is shipped, with cost and figures."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest

from ssl_pipeline.commands.recipes import as_markdown, as_text, recipe_headers
from ssl_pipeline.config import RECIPES, ConfigError, recipe_files


def test_all_are_listed_by_folder_and_name():
    headers = recipe_headers()
    assert {head.name for head in headers} == recipe_files(RECIPES).keys()
    assert [head.folder for head in headers] == sorted(head.folder for head in headers)


def test_a_folder_or_a_part_of_a_name_chooses_some():
    assert {head.folder for head in recipe_headers("photos")} == {"photos"}
    assert all("dino" in head.name for head in recipe_headers("dino"))
    with pytest.raises(ConfigError, match=r"^No recipe has '[^=]*' in its name, .*Did you mean 'dino_vits16'"):
        recipe_headers("dino_vits61")


def test_text_has_cost_and_figures_below_what_it_trains():
    assert as_text(recipe_headers("dino_vits16")).splitlines() == [
        "imagenet:",
        "  dino_vits16  DINO ViT-S/16, ImageNet-1k, 100 epochs",
        "                 cost: 8 GPUs, 1.75 days; theirs: k-NN 69.3 %, linear 74.0 %",
    ]


def test_markdown_is_a_table():
    head, line, row = as_markdown(recipe_headers("dino_vits16")).splitlines()
    assert head == "| recipe | what it trains | cost | theirs | ours |"
    assert line == "| --- | --- | --- | --- | --- |"
    assert row == (
        "| `dino_vits16` | DINO ViT-S/16, ImageNet-1k, 100 epochs | 8 GPUs, 1.75 days "
        "| k-NN 69.3 %, linear 74.0 % | - |"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"seed: 0\n", "must begin with comments"), (b"# caf\xe9\n", r"is not UTF-8 text: byte 5 is not valid")],
)
def test_a_head_that_cannot_be_read_is_named_and_hides_no_other(tmp_path: Path, content: bytes, told: str):
    shutil.copy(recipe_files(RECIPES)["digits_dino"], tmp_path)
    (tmp_path / "headless.yaml").write_bytes(content)
    with (
        mock.patch("ssl_pipeline.commands.recipes.RECIPES", tmp_path),
        pytest.warns(UserWarning, match=rf"^Left out: \S+headless\.yaml {told}"),
    ):
        assert [head.name for head in recipe_headers()] == ["digits_dino"]

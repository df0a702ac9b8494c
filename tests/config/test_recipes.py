"""Recipes are found by their file name, wherever they lie below the recipes' folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline.config import COMPARISONS, RECIPES, ConfigError, read_recipe, recipe_files


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, int], Path]:
    """Writes the recipe `name` below the folder of recipes; `seed` is what it says."""

    def write(name: str, seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"seed: {seed}\n")
        return path

    return write


def test_a_recipe_is_found_in_any_folder(tmp_path, write):
    write("near.yaml", 1)
    write("a/b/deep.yaml", 2)
    assert list(recipe_files(tmp_path)) == ["deep", "near"]
    assert read_recipe("deep", tmp_path) == {"seed": 2}
    assert read_recipe("near", tmp_path) == {"seed": 1}


def test_a_name_that_two_recipes_have_is_refused(tmp_path, write):
    first, second = write("a/mine.yaml"), write("b/mine.yaml")
    with pytest.raises(ConfigError) as caught:
        read_recipe("mine", tmp_path)
    assert str(caught.value) == f"Two recipes have the name 'mine': {first} and {second}. Rename one."


def test_a_path_is_a_recipe_too(tmp_path, write):
    path = write("elsewhere/mine.yaml", 3)
    assert read_recipe(str(path), tmp_path / "nothing") == {"seed": 3}


def test_a_comparison_is_no_recipe_of_a_run(tmp_path, write):
    write("comparisons/both.yaml", 4)
    write("one.yaml")
    with pytest.raises(ConfigError, match=r"^No recipe 'both'\. Known: one$"):
        read_recipe("both", tmp_path)
    assert read_recipe("both", tmp_path / "comparisons") == {"seed": 4}
    write("a/both.yaml", 5)  # the same name for both is no mistake
    assert read_recipe("both", tmp_path) == {"seed": 5}


@pytest.mark.parametrize(("name", "first"), [("dinov3", "dinov3_vitl16"), ("simclr", "digits_simclr"), ("", "")])
def test_of_many_recipes_the_near_ones_are_named(name, first):
    with pytest.raises(ConfigError) as caught:
        read_recipe(name, RECIPES)
    told = str(caught.value)
    assert f"Known: {first}" in told
    assert told.count("_") < 40
    assert len(told) < 500
    assert told.endswith(f", ... ({len(recipe_files(RECIPES))} in all; python -m ssl_pipeline recipes lists them)")


def test_a_checkout_has_its_own_recipes():
    assert Path(__file__).parents[2] / "recipes" == RECIPES
    assert {"digits_dino", "dino_vits16"} <= recipe_files(RECIPES).keys()
    assert recipe_files(COMPARISONS)
    assert not recipe_files(COMPARISONS).keys() & recipe_files(RECIPES).keys()

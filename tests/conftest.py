"""What every test has in common, and the markers that tests get by themselves."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

import pytest

TYPICAL = {"dino", "simclr", "mae", "fixmatch", "dino_vits16", "simclr_resnet50", "caltech_no_label_to_few"}
"""The methods, recipes and comparisons that stand for all others while one works."""
MANY = {
    "test_api",
    "test_create",
    "test_crop_on",
    "test_deduplicate",
    "test_dense",
    "test_early_values",
    "test_export",
    "test_finetune",
    "test_generated",
    "test_image_sizes",
    "test_images",
    "test_layouts",
    "test_library",
    "test_linear",
    "test_loading",
    "test_make_shards",
    "test_masked_views",
    "test_networks",
    "test_notebooks",
    "test_number_ranges",
    "test_on_nan",
    "test_pictures_of_method",
    "test_refusals",
    "test_remote",
    "test_report",
    "test_runs",
    "test_self_training",
    "test_tokens",
    "test_torture",
    "test_trial",
    "test_view_sizes",
    "test_which_networks",
}
"""Modules that go through many networks, settings, sizes, servers or whole runs; and the benchmarks."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`ddp` for what starts processes by tests/ranks.py or subprocess, `other` for what is about a method or recipe
    that is not `TYPICAL` or about `MANY` things, and a skip for `gpu` where there is none.
    """
    import torch  # here: the process that hands the tests to pytest-xdist's workers then begins without it

    from ssl_pipeline.config import COMPARISONS, RECIPES, recipe_files
    from tests.tiny import CLASSES

    torch.set_num_threads(1)  # wherever OMP_NUM_THREADS is set to another number
    others = {*CLASSES, *recipe_files(RECIPES), *recipe_files(COMPARISONS)} - TYPICAL
    for item in items:
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        of_other = item.path.stem.removeprefix("test_") in others or item.path.stem in MANY
        of_other |= item.path.parent.name == "benchmarks"
        if of_other or any(isinstance(value, str) and value in others for value in parameters):
            item.add_marker("other")
        if getattr(item, "originalname", "") in starting_processes(item.path):
            item.add_marker("ddp")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """What all tests share is no garbage: looking through a million objects each time takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@cache
def starting_processes(path: Path) -> frozenset[str]:
    """The tests, fixtures and functions of a module that start processes, directly or through each other."""
    text = path.read_text(encoding="utf-8")
    if "subprocess" not in text and "tests.ranks" not in text:  # most modules, and parsing them takes seconds in all
        return frozenset()
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "tests.ranks"]
    found = {"subprocess"} | {alias.name for node in imports for alias in node.names}
    used = {node.name: names_in(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    while more := {name for name, names in used.items() if names & found} - found:
        found |= more
    return frozenset(found)


def names_in(function: ast.FunctionDef) -> set[str]:
    """What a function mentions: names, and as parameters the fixtures that it asks for."""
    nodes = list(ast.walk(function))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}

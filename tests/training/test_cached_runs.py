"""Runs whose crops are cut out elsewhere, or whose images stay decoded, are the same runs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ranks import start
from tests.runs import Happening, command, equal, final_state, losses, write_recipe
from tests.tiny import write_shards


def finish(*argv: str, happening: Happening | None = None) -> int:
    return start(command, list(argv), happening).wait()


@pytest.fixture(scope="module", params=["dino", "fixmatch"])
def plain(request, tmp_path_factory) -> tuple[str, Path]:
    """A recipe and its run with crops from the workers."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = f"recipe={write_recipe(folder / 'tiny.yaml', request.param, write_shards(folder / 'shards'))}"
    assert finish(recipe, f"output={folder / 'run'}", "data.crop_on=worker") == 0
    return recipe, folder / "run"


@pytest.mark.parametrize("key", ["data.crop_on=device", "data.cache=true"])
def test_on_a_cpu_a_run_is_the_same_wherever_its_crops_are_cut_out(tmp_path, plain, key):
    recipe, expected = plain
    assert finish(recipe, f"output={tmp_path}", key, "data.workers=1") == 0
    assert losses(tmp_path) == losses(expected)
    assert equal(final_state(tmp_path), final_state(expected))


def test_a_run_with_a_cache_that_was_stopped_goes_on_bit_for_bit(tmp_path, plain):
    recipe, expected = plain
    argv = [recipe, f"output={tmp_path}", "data.cache=true"]
    assert finish(*argv, happening=Happening("SIGTERM", at=5)) == 128 + signal.SIGTERM
    assert finish(*argv) == 0
    assert losses(tmp_path) == losses(expected)
    assert equal(final_state(tmp_path), final_state(expected))

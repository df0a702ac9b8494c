"""A `~` in a path means the home directory in every command: no shell replaces it in `key=~/x`."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ssl_pipeline.commands.console import COMMANDS
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, Config, ConfigError, PlaceText, load
from ssl_pipeline.config.schema import alternatives, walk
from ssl_pipeline.data.shards.listing import list_shards
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.packing.make_shards import MakeShards


class Places(Config):
    """Settings with places."""

    one: Path
    maybe: Path | None = None
    text: PlaceText | None = None
    other: str = "~/as it is"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_paths_and_place_texts_begin_at_home(home: Path) -> None:
    read = load(Places, ["one=~/a", "maybe=b/~", "text=~/c"])
    assert (read.one, read.maybe, read.text, read.other) == (home / "a", Path("b/~"), f"{home}/c", "~/as it is")
    assert Places(one=Path("~")).one == home


def test_a_home_that_is_not_there_is_one_sentence() -> None:
    for read in (lambda: load(Places, ["one=~nobody-of-that-name/a"]), lambda: list_shards("~nobody-of-that-name/a")):
        with pytest.raises(ConfigError, match="no home directory for the ~ in '~nobody-of-that-name/a'"):
            read()


def test_real_commands_do_so(home: Path) -> None:
    recipe = home / "mine.yaml"
    recipe.write_text(next(RECIPES.rglob("digits_dino.yaml")).read_text())
    argv = ["recipe=~/mine.yaml", "output=~/x", "data.keep=~/k.npy", "data.cache_dir=~/c", "backbone.weights=~/w.pth"]
    read = load(PretrainConfig, argv, recipes=RECIPES)
    assert (read.run_directory, read.data.keep, read.data.cache_dir) == (home / "x", home / "k.npy", home / "c")
    assert read.backbone.weights == f"{home}/w.pth"
    assert load(KnnConfig, ["run=~/r", "train=a", "test=b"]).run == home / "r"
    made = load(MakeShards, ["source=~/s", "output=~/o", "labels=~/l.csv"])
    assert (made.source, made.output, made.labels) == (f"{home}/s", home / "o", f"{home}/l.csv")
    assert load(MakeShards, ["source=digits", "output=o"]).source == "digits"


@pytest.mark.parametrize("module", sorted(COMMANDS.values()))
def test_no_setting_that_is_a_file_is_plain_text(module: str) -> None:
    """By its help: a key of type `str` that speaks of a file or a folder is a PlaceText, or a set of shards."""
    module = module.replace("commands.start", "commands.pretrain")
    found = vars(importlib.import_module(module)).values()
    for schema in (thing for thing in found if isinstance(thing, type) and issubclass(thing, Config)):
        for key, field in walk(schema, None):
            about = (field.description or "").lower()
            speaks = about.startswith(("folder", "directory", "a weights file", "weights to start from"))
            if speaks and str in alternatives(field.annotation) and "shards" not in about:
                assert "at_home" in str(field.metadata) + str(field.annotation), f"{schema.__name__}.{key}"

"""Atomic writes: the old text or the new one, whatever happens."""

import json
import os

import pytest

from ssl_pipeline.files import write_json, write_text


def test_text_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "first")
    write_text(path, "ß second")
    assert path.read_text(encoding="utf-8") == "ß second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch, operation):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"top1": float("nan"), "all": (1, float("inf"), 0.1), "name": "k-NN"})
    assert json.loads(path.read_text()) == {"top1": None, "all": [1, None, 0.1], "name": "k-NN"}

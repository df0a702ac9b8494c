"""A damaged manifest of ours is named; one of another program is nobody's business."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestShard,
    parse_manifest,
    read_manifest,
    write_manifest,
)

SHARDS = [ManifestShard("a.tar", 3, 900, "0" * 64), ManifestShard("b.tar", 2, 600, "1" * 64)]
NO_KEYS = "must have exactly the keys name, samples, bytes, sha256"


def test_a_written_manifest_is_read_as_it_was(tmp_path: Path) -> None:
    manifest = Manifest(["cat", "dog"], SHARDS, {"command": "make_shards"})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize("of_others", [[], 3, None, {}, {"shards": 4}, {"name": "My app", "icons": []}])
def test_what_another_program_wrote_is_no_manifest(tmp_path: Path, of_others: object) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(of_others))
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("text", [b"{", b'{"samples": 1, "bytes": 2}'])
@pytest.mark.parametrize(
    ("place", "advice"),
    [
        (
            "HTTPS://host/set/manifest.json",
            "Over http it is needed: copy it there again, .* write_manifest=true writes",
        ),
        ("s3://bucket/set/manifest.json", "Copy it again, or delete it to use the shards without it."),
        (Path("set") / "manifest.json", "Copy it again, or delete it to use the shards without it."),
    ],
)
def test_the_way_out_of_a_damaged_one_is_one_that_there_is(text: bytes, place: Path | str, advice: str) -> None:
    with pytest.raises(DataError, match=rf"manifest\.json' is (damaged|not valid JSON).*\. {advice}"):
        parse_manifest(text, place)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content.pop("shards"), "it has no list of shards"),
        (lambda content: content.update(shards={"a.tar": 3}), "it has no list of shards"),
        (
            lambda content: content["shards"][1].pop("sha256"),
            rf"shards\[1\] {NO_KEYS}",
        ),
        (lambda content: content["shards"].append("c.tar"), rf"shards\[2\] {NO_KEYS}"),
        (lambda content: content["shards"][0].update(samples=4), "its shards have 6 samples, but it says '5'"),
        (lambda content: content["shards"].pop(), "its shards have 3 samples, but it says '5'"),
        (lambda content: content.update(bytes=[]), r"its shards have 1,500 bytes, but it says '\[\]'"),
        (lambda content: content["shards"][0].update(bytes="900"), r"'900' in shards\[0\] is not a number of bytes"),
        (
            lambda content: content["shards"][0].update(samples=True),
            r"'True' in shards\[0\] is not a number of samples",
        ),
        (lambda content: content["shards"][0].update(name=7), r"the name in shards\[0\] must be a string: '7'"),
        (lambda content: content["shards"][1].update(name="a.tar"), "it lists a shard twice"),
        (lambda content: content.update(class_names="cat"), "class_names must be a list of names"),
        (lambda content: content.update(class_names=[{"a": 1}]), "class_names must be a list of names"),
    ],
)
def test_a_damaged_one_is_named_with_the_reason(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], reason: str
) -> None:
    write_manifest(tmp_path, Manifest(["cat", "dog"], SHARDS))
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    damage(content)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"manifest\.json' is damaged: {reason}. Copy it again"):
        read_manifest(tmp_path)

"""Which folders of a source are classes."""

from __future__ import annotations

import pytest

from ssl_pipeline.packing.candidates import find_candidates, parts_of_a_set
from ssl_pipeline.packing.sources import Rejected


class Names:
    """A source of which only the names are asked for."""

    def __init__(self, *names: str) -> None:
        self.all = sorted(names)

    def names(self) -> list[str]:
        return self.all

    def size(self, name: str) -> int:
        return 1

    def folders(self) -> set[str]:
        return {name.rpartition("/")[0] for name in self.all}

    def left_out(self) -> list[Rejected]:
        return []

    def read(self, name: str) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("a.jpg", "b.jpg"), None),
        (("cat/a.jpg", "dog/b.jpg"), ["cat", "dog"]),
        (("photos/cat/a.jpg", "photos/dog/b.jpg", "photos/readme.txt"), ["cat", "dog"]),
        (("a/b/cat/a.jpg", "a/b/dog/deep/b.jpg"), ["cat", "dog"]),
        (("photos/a.jpg", "photos/b.jpg"), ["photos"]),
        (("photos/cat/a.jpg", "photos/cat/b.jpg"), ["photos"]),
        (("photos/cat/a.jpg", "photos/dog/b.jpg", "photos/c.jpg"), ["photos"]),
        (("photos/cat/a.jpg", "photos/dog/b.jpg", "c.jpg"), ["photos"]),
        (("train/cat/a.jpg", "train/dog/b.jpg"), ["cat", "dog"]),
    ],
)
def test_a_folder_that_holds_all_others_is_no_class(names: tuple[str, ...], classes: list[str] | None) -> None:
    found = find_candidates(Names(*names))
    assert found.class_names == classes
    if classes and len(classes) > 1:
        assert [classes[image.label] in image.name for image in found.images if image.label is not None] == [True, True]
    top = sorted({name.split("/")[0] for name in names if "/" in name and not name.endswith("txt")})
    assert find_candidates(Names(*names), labels="folders").class_names == (top or None)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("test/cat/a.jpg", "train/cat/b.jpg"), ["train", "test"]),
        (("set/Test/a.jpg", "set/train/cat/b.jpg", "set/labels/c.txt"), ["set/train", "set/Test"]),
        (("test/a.jpg", "train/b.jpg", "other/c.jpg"), []),
        (("a.jpg",), []),
    ],
)
def test_parts_of_a_set_are_found_where_they_are(names: tuple[str, ...], parts: list[str]) -> None:
    assert parts_of_a_set(find_candidates(Names(*names))) == parts

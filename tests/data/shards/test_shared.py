from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline.data.shards import shared
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.shards.shared import SharedImages, shared_images

WriteTar = Callable[..., Path]


def image(number: int, *, length: int = 9000) -> bytes:
    """Not decoded here: a head and an end that all share, and a middle of its own."""
    return b"head" * 500 + bytes([number]) * (length - 4000) + b"tail" * 500


@pytest.fixture
def sets(tmp_path: Path, write_tar: WriteTar) -> tuple[Path, Path]:
    """Images 0 to 5 in two shards; 4 to 8 in one, under other keys."""
    for folder, name, numbers in (("first", "a", range(3)), ("first", "b", range(3, 6)), ("second", "c", range(4, 9))):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_tar(tmp_path / folder / f"{name}.tar", {f"{name}{number}.jpg": image(number) for number in numbers})
    return tmp_path / "first", tmp_path / "second"


def test_images_are_found_by_their_bytes_whatever_their_keys_and_shards(sets: tuple[Path, Path]) -> None:
    first, second = map(open_shards, sets)
    assert shared_images(first, second) == SharedImages(count=2, looked_at=5, total=5)
    assert shared_images(second, first) == SharedImages(count=2, looked_at=6, total=6)


def test_images_of_another_length_are_others(tmp_path: Path, write_tar: WriteTar) -> None:
    for folder, length in (("short", 9000), ("long", 9001)):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", {"a.jpg": image(1, length=length)})
    assert shared_images(open_shards(tmp_path / "short"), open_shards(tmp_path / "long")).count == 0


def test_shards_that_are_the_same_are_not_read(sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_shards(sets[0])
    monkeypatch.setattr(shared, "_digest", lambda *_: pytest.fail("an image was read"))
    assert shared_images(index, index) == SharedImages(count=6, looked_at=6, total=6)


def test_of_many_images_some_are_looked_for(sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_IMAGES", 3)
    assert shared_images(*map(open_shards, sets)) == SharedImages(count=1, looked_at=3, total=5)  # 4, 6 and 8

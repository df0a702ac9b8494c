"""The list of files that an image goes through (docs/architecture.md), against a trace of a batch."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

ROOT = Path(__file__).parents[2]
GROUPS = {
    "global": ViewGroup(count=2, size=8, blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.5)),
    "strong": ViewGroup(size=8, rand_augment=1, cutout=(0.5, 0.5)),
}
MOST = 9


def section() -> str:
    return (
        (ROOT / "docs" / "architecture.md")
        .read_text(encoding="utf-8")
        .split("## From tar to loss")[1]
        .split("\n## ")[0]
    )


def listed() -> list[str]:
    """The numbered files, in their order."""
    return re.findall(r"^\d+\. `(\S+)`", section(), flags=re.M)


def beside() -> tuple[str, ...]:
    """The other files and folders that the section names."""
    return tuple(set(re.findall(r"`(\S+)`", section())) - set(listed()))


@contextmanager
def traced(calls: list[tuple[str, str]]) -> Iterator[None]:
    """Notes file (below ssl_pipeline) and name of each function of ours that is called."""
    package = f"{ROOT / 'ssl_pipeline'}/"

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append((frame.f_code.co_filename.removeprefix(package), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def trace(index: ShardIndex) -> list[str]:
    """The files in the order in which they are entered, from the first byte of a batch to what a method is given."""
    config = DataConfig(shards="", batch_size=4, workers=0, block_shards=2)
    normalised = {"mean": config.mean, "std": config.std}
    stream = open_stream(index, GROUPS, config, seed=0, position=0, rank=0, world_size=1)
    make_batch(next(stream).to("cpu"), GROUPS, **normalised)  # opens files
    calls = list[tuple[str, str]]()
    with traced(calls):
        make_batch(next(stream).to("cpu"), GROUPS, **normalised)
    first = calls.index(("data/shards/open.py", "read"))
    return [file for file, _ in calls[first:]]


def test_an_image_goes_through_the_listed_files_in_their_order(shards: Path) -> None:
    entered = list(dict.fromkeys(trace(open_shards(shards))))
    assert [file for file in entered if file in listed()] == listed()
    assert len(listed()) <= MOST


def test_every_other_file_on_the_way_is_named_beside_the_list(shards: Path) -> None:
    others = set(trace(open_shards(shards))) - set(listed())
    assert "augment/operations/blur.py" in others
    unnamed = [file for file in sorted(others) if not file.startswith(beside())]
    assert not unnamed, f"docs/architecture.md does not name {', '.join(unnamed)}, which an image goes through"


def test_each_is_entered_once(shards: Path) -> None:
    path = [file for file in trace(open_shards(shards)) if file in listed()]
    of_worker, of_trainer = listed()[:6], listed()[6:]
    handed_over = path.index("data/batches.py")
    assert set(path[:handed_over]) == set(of_worker)
    assert set(path[handed_over:]) == set(of_trainer)


def test_what_is_named_exists() -> None:
    for name in (*listed(), *beside()):
        if "/" in name or name.endswith(".py"):
            assert (ROOT / "ssl_pipeline" / name.removeprefix("ssl_pipeline/")).exists(), name

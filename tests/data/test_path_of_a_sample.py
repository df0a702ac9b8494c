"""The list of files that an image goes through (README.md, docs/architecture.md), against a trace of a batch."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from PIL import Image

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream
from ssl_pipeline.training.copying import Copies
from tests.data.conftest import WriteTar

ROOT = Path(__file__).parents[2]
GROUPS = {
    "global": ViewGroup(count=2, size=8, blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.5)),
    "strong": ViewGroup(size=8, rand_augment=1, cutout=(0.5, 0.5)),
}
MOST, BATCH = 9, 4
CPU = torch.device("cpu")


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


def in_the_readme() -> list[str]:
    """The files that the README names after "From tar to loss", in their order."""
    sentence = (ROOT / "README.md").read_text(encoding="utf-8").split("[From tar to loss]")[1].split("\n\n")[0]
    return re.findall(r"`(\w\S+\.py)`", sentence)


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


def trace(index: ShardIndex) -> list[tuple[str, str]]:
    """Files and functions in the order in which they are entered, from the first byte of a batch to a method's."""
    config = DataConfig(shards="", batch_size=BATCH, workers=0, block_shards=2)
    normalised = {"mean": config.mean, "std": config.std}
    stream = open_stream(index, GROUPS, config, seed=0, position=0, rank=0, world_size=1)
    log, copies = BadSampleLog(Path("bad_samples.jsonl"), budget=0.0, total=len(index)), Copies(CPU, own_stream=False)
    make_batch(copies(next(stream)), GROUPS, **normalised)  # opens files
    calls = list[tuple[str, str]]()
    with traced(calls):  # as TrainingStep does it
        images = next(stream)
        log.record(images.bad)
        make_batch(copies(images), GROUPS, **normalised)
    return calls[calls.index(("data/shards/open.py", "read")) :]


@pytest.fixture(params=["RGB", "L"])
def images(request: pytest.FixtureRequest, tmp_path: Path, write_tar: WriteTar) -> ShardIndex:
    """PNG images in colours, and in gray as the digits of the quickstart."""
    files = {}
    for number in range(12):
        encoded = io.BytesIO()
        Image.new(request.param, (8, 8), number).save(encoded, format="PNG")
        files[f"{number:04d}.png"] = encoded.getvalue()
    write_tar(tmp_path / "images-000000.tar", files)
    return open_shards(tmp_path)


def test_an_image_goes_through_the_listed_files_in_their_order(images: ShardIndex) -> None:
    entered = list(dict.fromkeys(file for file, _ in trace(images)))
    assert [file for file in entered if file in listed()] == listed()
    assert len(listed()) <= MOST
    assert in_the_readme() == listed()


def test_every_other_file_on_the_way_is_named_beside_the_list(images: ShardIndex) -> None:
    others = {file for file, _ in trace(images)} - set(listed())
    assert "augment/operations/blur.py" in others
    unnamed = [file for file in sorted(others) if not file.startswith(beside())]
    assert not unnamed, f"docs/architecture.md does not name {', '.join(unnamed)}, which an image goes through"


def test_each_is_entered_once(images: ShardIndex) -> None:
    """For each image, group of views or batch, by one function; a batch is handed over by three.

    `augment_on_cpu` is called for views with the same stages together.
    """
    calls, num_groups = trace(images), len(GROUPS)
    doors = {
        ("data/shards/open.py", "read"): BATCH,
        ("data/decode.py", "decode_image"): BATCH,
        ("augment/draw.py", "draw"): 1,
        ("augment/crops.py", "crop_images"): num_groups,
        ("data/batches.py", "over"): 1,
        ("data/batches.py", "to"): 1,
        ("data/batches.py", "make_batch"): 1,
        ("augment/photometric.py", "apply_photometric"): num_groups,
    }
    assert {door: calls.count(door) for door in doors} == doors
    handed_over = calls.index(("data/batches.py", "over"))
    of_trainer = {file for file, _ in calls[handed_over:] if file in listed()}
    assert of_trainer == set(listed()[6:])


def test_what_is_named_exists() -> None:
    for name in (*listed(), *beside()):
        if "/" in name or name.endswith(".py"):
            assert (ROOT / "ssl_pipeline" / name.removeprefix("ssl_pipeline/")).exists(), name

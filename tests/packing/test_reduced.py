"""Images encoded anew for shards: small, baseline, upright, bare."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from ssl_pipeline.config import run_command
from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.metadata import ORIENTATION
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data_tools.check_shards import CheckShards, check_shards
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from ssl_pipeline.packing.reduced import MAX_JPEG_SIDE, Packing, baseline_without_metadata, pack, packed_size

PACKING = Packing(short_side=20, quality=90)
FOUR_TWO_ZERO = 2


def smooth(width: int, height: int) -> Image.Image:
    """A picture whose four corners differ."""
    across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))


def saved(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    "source",
    [
        lambda: saved(smooth(60, 40)),
        lambda: saved(smooth(60, 40), progressive=True),
        lambda: saved(smooth(60, 40), subsampling="4:4:4"),
        lambda: saved(smooth(60, 40).convert("L")),
        lambda: saved(smooth(60, 40).convert("CMYK")),
        lambda: saved(smooth(60, 40), "PNG"),
        lambda: saved(smooth(60, 40), "WEBP"),
        lambda: saved(smooth(30, 20), progressive=True),
        lambda: saved(smooth(30, 20), "PNG"),
    ],
)
def test_every_image_becomes_small_baseline_jpeg(source: Callable[[], bytes]) -> None:
    data = source()
    image = opened(pack(data, PACKING))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (30, 20))
    assert "progressive" not in image.info
    assert get_sampling(image) == FOUR_TWO_ZERO
    before = opened(data).convert("RGB").resize((30, 20), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(before)).mean() < 3


@pytest.mark.parametrize(
    ("height", "width", "packed"),
    [
        (375, 500, (320, 427)),
        (500, 375, (427, 320)),
        (320, 999, (320, 999)),
        (10, 20, (10, 20)),
        (640, 640, (320, 320)),
    ],
)
def test_the_shorter_side_is_bounded_and_nothing_is_enlarged(height: int, width: int, packed: tuple[int, int]) -> None:
    assert packed_size(height, width, 320) == packed


def test_what_is_small_and_baseline_keeps_its_encoded_pixels() -> None:
    data = saved(smooth(30, 20), quality=60)
    assert pack(data, PACKING) == data
    assert pack(pack(data, PACKING), PACKING) == data


def test_metadata_are_dropped_and_pixels_kept() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description of the picture " * 20
    bare = saved(smooth(30, 20), quality=60)
    full = saved(smooth(30, 20), quality=60, exif=exif, icc_profile=b"profile" * 100, comment=b"made by hand")
    assert pack(full, PACKING) == bare
    assert not opened(pack(saved(smooth(60, 40), exif=exif, icc_profile=b"profile"), PACKING)).info.keys() & {
        "exif",
        "icc_profile",
    }


def test_a_larger_original_is_encoded_anew() -> None:
    data = saved(smooth(30, 20), quality=100)
    packed = pack(data, PACKING)
    assert len(packed) < len(data)
    assert np.abs(decode_image(packed).astype(int) - decode_image(data)).max() < 12


@pytest.mark.parametrize("size", [(30, 20), (60, 40)])
def test_the_orientation_is_applied(size: tuple[int, int]) -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        data = saved(smooth(*size), quality=60, exif=exif)
        packed = pack(data, PACKING)
        upright = Image.fromarray(decode_image(data))
        upright.thumbnail((30, 30))
        assert "exif" not in opened(packed).info
        assert np.abs(decode_image(packed).astype(int) - np.asarray(upright)).mean() < 3


def test_transparent_pixels_become_white() -> None:
    image = smooth(60, 40).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert decode_image(pack(saved(image, "PNG"), PACKING)).min() == 255


def test_an_image_that_fits_no_jpeg_is_refused(tmp_path: Path) -> None:
    data = saved(Image.new("L", (MAX_JPEG_SIDE + 100, 10)), "PNG")
    with pytest.raises(DecodeError, match="65600x10 pixels are too large for a JPEG"):
        pack(data, PACKING)
    assert opened(pack(data, Packing(short_side=9, quality=90))).size == (59040, 9)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "long.png").write_bytes(data)
    (tmp_path / "images" / "plain.png").write_bytes(saved(smooth(60, 40), "PNG"))
    output = made(tmp_path / "images", tmp_path / "out", short_side=20)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").open()]
    assert rejected == [
        {"file": "long.png", "reason": "65600x10 pixels are too large for a JPEG, whose limit is 65500"}
    ]
    assert len(open_shards(output)) == 1


@pytest.mark.parametrize("damage", ["cut in the header", "no scan", "length 0", "png"])
def test_damaged_headers_are_nobodys_baseline(damage: str) -> None:
    data = saved(smooth(30, 20))
    scan = data.index(b"\xff\xda")
    damaged = {
        "cut in the header": data[: scan - 30],
        "no scan": data[:scan],
        "length 0": data[:4] + b"\0\0" + data[6:],
        "png": b"\x89PNG" + struct.pack(">I", zlib.crc32(data)),
    }
    assert baseline_without_metadata(data) == data
    assert baseline_without_metadata(damaged[damage]) is None


def made(source: Path, output: Path, **settings: object) -> Path:
    config = MakeShards(source=str(source), output=output, **{"workers": 1, "samples_per_shard": 6} | settings)
    assert make_shards(config) == 0
    return output


def tars(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("*.tar"))]


def test_shards_hold_packed_images_and_say_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        (folder / "train" / "cat" / f"large-{number}.jpg").write_bytes(saved(smooth(90 + number, 60), progressive=True))
    output = made(folder, tmp_path / "packed", prefix="train", short_side=20)
    settings = json.loads((output / "manifest.json").read_text())["source"]
    assert (settings["short_side"], settings["quality"]) == (20, 90)
    index = open_shards(output)
    images = [opened(index.read(number).image) for number in range(len(index))]
    assert len(index) == 25
    assert all(image.format == "JPEG" and "progressive" not in image.info for image in images)
    assert sorted(min(image.size) for image in images)[-3:] == [20, 20, 20]
    assert index.class_names == ("cat", "dog", "owl")
    assert run_command(CheckShards, check_shards, command="check_shards", argv=[str(output), "workers=1"]) == 0
    assert "25 images (25 with a label)" in capsys.readouterr().out


def test_packed_shards_are_another_data_set(folder: Path, tmp_path: Path) -> None:
    plain = made(folder, tmp_path / "a" / "out", prefix="train")
    packed = made(folder, tmp_path / "b" / "out", prefix="train", short_side=20)
    other = made(folder, tmp_path / "c" / "out", prefix="train", short_side=20, quality=50)
    again = made(folder, tmp_path / "d" / "out", prefix="train", short_side=20, workers=3, samples_per_shard=6)
    assert len({open_shards(output).fingerprint for output in (plain, packed, other)}) == 3
    assert json.loads((plain / "manifest.json").read_text())["source"]["short_side"] is None
    assert tars(again) == tars(packed)  # whatever the number of processes
    assert open_shards(again).fingerprint == open_shards(packed).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["short_side=15"], "short_side must be at least 16. Got 15."),
        (["short_side=320", "quality=0"], "quality must be at least 1. Got 0."),
        (["short_side=320", "quality=101"], "quality must be at most 100. Got 101."),
        (["quality=90"], "quality=90 goes with short_side=PIXELS. Without it images are stored as they are."),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, settings: list[str], message: str
) -> None:
    argv = ["source=digits", f"output={tmp_path / 'out'}", *settings]
    assert run_command(MakeShards, make_shards, command="make_shards", argv=argv) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {message}"

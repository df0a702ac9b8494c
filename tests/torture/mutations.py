"""Bytes from others, damaged at random: each is read, or refused in one sentence, in a moment.

The damage comes from a seed and a number, so that any case can be made again.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pipeline.backbones.weights.reading import read_tensors
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, RunError, load, printable, sentences_of
from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data_tools.check_shards import CheckShards, check_shards
from ssl_pipeline.packing.candidates import find_candidates
from ssl_pipeline.packing.sources import UnreadableFileError, open_source
from ssl_pipeline.run.checkpoint_files import load_checkpoint
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.state import RunState
from tests.tiny import make_method, write_shards
from tests.torture.outcome import Outcome

REFUSALS = (ConfigError, RunError, DecodeError, UnreadableFileError)
SECONDS = 20.0  # of processor time for one case
LONGEST = 500  # characters of what is told
PROMISE = "read, or refused in one line"
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"-1",
    b"9" * 20,
    b"\n",
    b"\x1b[2J",
    b"../",
    b"",
)


@dataclass(frozen=True)
class Target:
    """Something that reads bytes of others: `content` is a good example, `read` raises one of REFUSALS or nothing."""

    content: bytes
    read: Callable[[bytes], object]


def mutated(content: bytes, draws: random.Random) -> bytes:
    """The bytes after one to four damages: flipped, overwritten, cut out, doubled, cut off."""
    damaged = bytearray(content)
    for _ in range(draws.randint(1, 4)):
        if not damaged:
            break
        place, length = draws.randrange(len(damaged)), draws.choice((1, 2, 4, 16, 512))
        kind = draws.randrange(5)
        if kind == 0:
            damaged[place] ^= 1 << draws.randrange(8)
        elif kind == 1:
            new = draws.choice(INTERESTING) or draws.randbytes(length)
            damaged[place : place + len(new)] = new
        elif kind == 2:
            del damaged[place : place + length]
        elif kind == 3:
            damaged[place:place] = damaged[place : place + length]
        else:
            del damaged[place:]
    return bytes(damaged)


def torture_bytes(folder: Path, *, cases: int, seed: int, only: str | None = None) -> list[Outcome]:
    """`cases` damaged examples for each target, below the folder."""
    outcomes = []
    for name, target in targets(folder).items():
        if only is not None and only != name:
            continue
        outcome = Outcome(f"damaged {name}", PROMISE)
        target.read(target.content)  # the undamaged one is read
        for number in range(cases):
            failure = _failure(target, mutated(target.content, random.Random(f"{seed} {name} {number}")))
            outcome.count(None if failure is None else f"case {number} of seed {seed}: {failure}")
        outcomes.append(outcome)
    return outcomes


def _failure(target: Target, content: bytes) -> str | None:
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(content)
    except REFUSALS as error:
        longest = max((printable(told, longest=None) for told in sentences_of(error)), key=len)
        if len(longest) > 2 * LONGEST:  # a name from outside may be long: the printer shortens it
            return f"{len(longest)} characters are told: {longest[:100]}"
    except Exception as error:
        return f"{type(error).__name__}: {printable(str(error))[:200]}"
    seconds = time.process_time() - began
    return f"took {seconds:.0f} s" if seconds > SECONDS else None


def targets(folder: Path) -> Mapping[str, Target]:
    """Everything that reads bytes of others, with a good example of each."""
    shards = write_shards(folder / "shards", (6,))
    open_shards(shards)
    (tar,) = shards.glob("*.tar")
    found = {f"{kind} image": Target(image(kind), decode_image) for kind in ("PNG", "JPEG", "WEBP")}
    found["shard"] = Target(tar.read_bytes(), lambda content: _read_shard(folder / "tar", content))
    for file in sorted(path for path in (shards / ".index").rglob("*") if path.is_file() and path.stat().st_size):
        name = f"index ({file.suffix.lstrip('.') or file.name})"
        found[name] = Target(file.read_bytes(), _in_place(shards, file, lambda: _read_all(shards)))
    found["manifest"] = _manifest_target(folder)
    found["zip"] = Target(zipped(), lambda content: _read_zip(folder / "images.zip", content))
    recipe = (RECIPES / "digits" / "digits_dino.yaml").read_bytes()
    found["recipe"] = Target(recipe, lambda content: _read_recipe(folder / "recipe.yaml", content))
    found |= _checkpoint_targets(folder)
    return found


def image(kind: str) -> bytes:
    """A small picture in that format, with metadata."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, exif=exif)
    return file.getvalue()


def zipped() -> bytes:
    """Images of two classes, each compressed in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, method in enumerate(
            (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        ):
            archive.writestr(f"class{number % 2}/été{number}.png", image("PNG"), compress_type=method)
    return file.getvalue()


def _in_place(shards: Path, file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Reads the shards with one of their files replaced, which is afterwards as it was."""
    good = file.read_bytes()

    def with_content(content: bytes) -> object:
        file.write_bytes(content)
        try:
            return read()
        finally:
            file.write_bytes(good)

    return with_content


def _read_shard(folder: Path, content: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "a-000000.tar").write_bytes(content)
    _read_all(folder)


def _read_all(shards: Path) -> None:
    index = open_shards(shards)
    assert index.fingerprint
    for sample in range(len(index)):
        raw = index.read(sample)
        assert raw.location
        try:
            decode_image(raw.image)
        except DecodeError:
            continue
    if index.has_labels:
        index.labels()


def _manifest_target(folder: Path) -> Target:
    shards = write_shards(folder / "with_manifest", (5,))
    (tar,) = shards.glob("*.tar")
    check_shards(CheckShards(directory=str(shards), write_manifest=True))
    assert tar.exists()
    manifest = shards / "manifest.json"
    assert json.loads(manifest.read_text())
    return Target(manifest.read_bytes(), _in_place(shards, manifest, lambda: _read_all(shards)))


def _read_zip(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    source = open_source(str(path))
    for candidate in find_candidates(source).images:
        try:
            decode_image(source.read(candidate.name))
        except (UnreadableFileError, DecodeError):
            continue


def _read_recipe(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    load(PretrainConfig, [f"recipe={path}"], recipes=RECIPES)


def _checkpoint_targets(folder: Path) -> Mapping[str, Target]:
    method = make_method("simclr")
    saved = Checkpoints(folder / "run" / "checkpoints").save(
        RunState(8, 8, {"images": "3"}), {"method": method.state_dict(), "optimizer": {}}
    )
    manifest, tensors = saved / "manifest.json", saved / "method.safetensors"
    weights = folder / "weights.safetensors"

    def read_weights(content: bytes) -> object:
        weights.write_bytes(content)
        return read_tensors(weights)

    return {
        "checkpoint manifest": Target(
            manifest.read_bytes(), _in_place(saved, manifest, lambda: load_checkpoint(saved))
        ),
        "checkpoint tensors": Target(tensors.read_bytes(), _in_place(saved, tensors, lambda: load_checkpoint(saved))),
        "weights": Target(tensors.read_bytes(), read_weights),
    }

"""An output directory that appears when it is complete, and replaces only an older one of its kind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import INDEX_DIRECTORY, INDEX_FILE
from ssl_pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from ssl_pipeline.data.shards.origins import ORIGINS_FILE
from ssl_pipeline.files import lock, open_no_link

REJECTED_FILE = "rejected.jsonl"
PARTS = ("train", "test")  # of holdout=
LOCK_FILE = ".lock"
UNFINISHED = ".unfinished-"


@contextmanager
def output_in_the_making(output: Path, *, overwrite: bool, work: str | None = None) -> Iterator[Path]:
    """A folder next to the output that becomes the output at the end; nothing is left of it if that is not reached.

    Each run has its own folder, so that late writes of a killed run cannot get into the next one's. With
    `work`, which says what is made and from what, the folder stays if the end is not reached, and the next run of the
    same work finds it again; what begins with UNFINISHED in it does not get into the output.
    """
    output = output.resolve()
    _refuse(output, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = f".{output.name}.partial-"
    found = [path for path in output.parent.iterdir() if path.name.startswith(start) and not path.is_symlink()]
    _clear_leftovers(found, output, kept=f"{start}{work}")
    if work is None:
        folder = Path(tempfile.mkdtemp(prefix=start, dir=output.parent))
    else:
        folder = output.parent / f"{start}{work}"
        folder.mkdir(exist_ok=True)
    reached = False
    try:
        with (folder / LOCK_FILE).open("w") as file:
            lock(file, inherited=False)  # by worker processes, which may outlive this one
            yield folder
            reached = True
            cut_off = folder.rglob(f".{UNFINISHED}*")  # written aside when a run was killed
            for path in (folder / LOCK_FILE, *folder.rglob(f"{UNFINISHED}*"), *cut_off):
                path.unlink()
        folder.chmod(0o777 & ~_umask())  # mkdtemp's own mode keeps other users out
        _replace(folder, output, overwrite=overwrite)
    finally:
        if reached or work is None:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_leftovers(folders: Sequence[Path], output: Path, *, kept: str) -> None:
    """Delete what interrupted runs left, except the folder called `kept`; a run that is alive holds its lock."""
    for folder in folders:
        with suppress(FileNotFoundError):
            descriptor = open_no_link(folder / LOCK_FILE, os.O_RDWR)
            try:
                if not lock(descriptor, wait=False, inherited=False):
                    raise DataError(f"Another make_shards is writing '{output}' at this moment.")
            finally:
                os.close(descriptor)
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse(output: Path, *, overwrite: bool) -> None:
    """Raise DataError if the output is in use, or holds what no make_shards wrote."""
    if output.exists() and not output.is_dir():
        raise DataError(f"output='{output}' is a file. Needed: a directory that does not exist yet, or an empty one.")
    found = sorted((path.name for path in output.iterdir()), reverse=True) if output.exists() else []
    if found and not overwrite:
        raise DataError(f"output='{output}' is not empty (it has '{found[0]}'). overwrite=true replaces shards there.")
    foreign = _foreign(output) if found else None
    if foreign is not None:
        raise DataError(
            f"output='{output}' holds '{foreign.relative_to(output)}', which make_shards did not write, or which "
            "changed since. Choose another output."
        )


def _foreign(folder: Path) -> Path | None:
    """Something in a folder that no make_shards and no index wrote there; None if there is nothing else.

    A shard is known by its name and size in the manifest, and the manifest by the source that it names.
    """
    manifest = read_manifest(folder)
    written = {} if manifest is None or not manifest.source else {shard.name: shard.bytes for shard in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            return path
        if path.is_dir():
            if path.name in PARTS and not written:
                inside = _foreign(path)
                if inside is not None:
                    return inside
            elif not (path.name.partition("-")[0] == INDEX_DIRECTORY and _is_index(path)):
                return path
        elif path.name == MANIFEST_FILE:
            if not written:
                return path
        elif path.name not in (REJECTED_FILE, ORIGINS_FILE) and written.get(path.name) != path.stat().st_size:
            return path
    return None


def _is_index(folder: Path) -> bool:
    return all(path.is_file() and (path.name == INDEX_FILE or path.suffix == ".npy") for path in folder.iterdir())


def _replace(folder: Path, output: Path, *, overwrite: bool) -> None:
    _refuse(output, overwrite=overwrite)  # something may have been written there meanwhile
    aside = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if output.exists():
        output.rename(aside)
    folder.rename(output)
    shutil.rmtree(aside, ignore_errors=True)

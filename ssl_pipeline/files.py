"""Files that are complete or absent (write aside, fsync, rename), their SHA-256, and locks on them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT}

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


# writing


@contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the name `path` at the end; on failure nothing is left. Readers of `path` see the
    old content or the new one. `durable=False` leaves out the fsync: a power cut may then lose the file, which is
    acceptable for a heartbeat.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)  # maybe a link to somewhere else
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`, whole or not at all (`written_whole`)."""
    with written_whole(path, durable=durable) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


def write_json(path: Path, value: JSON, *, durable: bool = True) -> None:
    """`write_text` of indented JSON; NaN and infinity become null, because JSON cannot represent them."""
    write_text(path, json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n", durable=durable)


def write_array(path: Path, array: NDArray, *, durable: bool = True) -> None:
    """Replace `path` by an array in numpy's format, whole or not at all."""
    with written_whole(path, durable=durable) as aside, aside.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, *, mapped: bool) -> NDArray | None:
    """The array of an .npy file, mapped or read; None if it holds none (a pickle does not count). A shortage
    (`is_shortage`) is raised: it says nothing about the file.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # numpy parses a header as Python code, so damage raises Python's errors
        if is_shortage(error):
            raise
        return None
    return array if isinstance(array, np.ndarray) else None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, durable: bool = True
) -> None:
    """Replace `path` by tensors in safetensors' format, whole or not at all; OSError if they cannot be written.

    They must be contiguous and share no memory with each other.
    """
    from safetensors import SafetensorError  # here, because it brings torch with it, and other files are written
    from safetensors.torch import save_file  # by commands that need no torch

    with written_whole(path, durable=durable) as aside:
        try:
            save_file(dict(tensors), aside, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # its own class even for a full disk
            raise OSError(f"cannot write {path}: {error}") from None
        aside.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory (a rename, a new file), survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_nan(value: JSON) -> JSON:
    """The same value with null in the place of every float that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_nan(entry) for entry in value]
    return value


def is_shortage(error: Exception) -> bool:
    """Whether an error says nothing about the file where it occurred: no open files, no memory, no rights, no
    network."""
    return isinstance(error, OSError) and error.errno in SHORTAGES


def open_no_link(path: Path, flags: int) -> int:
    """A descriptor of a file, made if `flags` has O_CREAT; OSError if there is a symbolic link in its place.

    For files with a fixed name in directories that others may write to.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here; delete it", str(path)) from None


# SHA-256, in hexadecimal digits


def sha256_of(file: Path | BufferedReader | FileIO) -> str:
    """Of the content of a file; of an open one from its position."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return sha256_of(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(*parts: bytes | memoryview) -> str:
    """Of some bytes, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values, in the order in which they come."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_json(value: object) -> str:
    """Of the JSON text of a value, whatever the order of its keys."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


# locks


def lock(file: int | IO, *, shared: bool = False, wait: bool = True, inherited: bool = True) -> bool:
    """Lock an open file or directory against other processes until it is closed; whether that was possible.

    With `inherited` (flock) forks hold the lock too, until all of them have closed the file. Without (POSIX, fcntl) it
    belongs only to this process: free at once when this process dies, whatever becomes of its forks, but also when it
    closes any other descriptor of that file; and the file must be open for writing. OSError where there are no locks.
    """
    take = fcntl.flock if inherited else fcntl.lockf
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        take(file, kind if wait else kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either for "locked"
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an existing file or directory against other processes, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: two processes may do the same, yet each file appears whole
            lock(descriptor)
        yield
    finally:
        os.close(descriptor)

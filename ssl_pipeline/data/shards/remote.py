"""Shards on other machines (http, s3, gs, ... through fsspec), fetched whole into a bounded cache on this one."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import Callback
from tqdm import tqdm

from ssl_pipeline.config import bar_interval
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import (
    Catalogue,
    no_samples,
    read_catalogue,
    say_if_made_again,
    user_cache,
    write_catalogue,
    write_rows,
)
from ssl_pipeline.data.shards.manifest import (
    MAKE_MANIFEST,
    MANIFEST_FILE,
    Manifest,
    ManifestShard,
    damaged_manifest,
    is_http,
    parse_manifest,
)
from ssl_pipeline.data.shards.rows import ShardEntry, index_shard
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.data.shards.verification import shard_changed
from ssl_pipeline.files import lock, locked, open_no_link, sha256_of, sha256_of_bytes, written_whole

RETRY_AFTER = (1.0, 5.0)  # seconds
LEAST_RATE, RATE_SECONDS = 10_000.0, 30.0  # bytes per second, looked at so often
MAX_MANIFEST_BYTES = 64 << 20  # half a million shards
ABANDONED = 3600.0  # seconds without a byte, after which a partial file is abandoned
CACHED = re.compile(r"\.?[0-9a-f]{32}-.+\.tar(\.\d+\.tmp)?")  # eviction touches no other file
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Result = TypeVar("Result")


def is_url(directory: str | Path) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(directory)) is not None


@dataclass(frozen=True)
class RemoteShards:
    """The shards at `url` and the cache that they pass through, of at most `cache_bytes`."""

    url: str
    cache: Path
    cache_bytes: int
    image_key: str | None = None
    verified: set[tuple[str, int]] = field(default_factory=set, compare=False, repr=False)
    """Files of the cache, by name and inode, whose SHA-256 was verified in this run."""

    @property
    def place(self) -> Path:
        """The index directory of these shards."""
        selection = self.url if self.image_key is None else f"{self.url}\0{self.image_key}"
        return self.cache / f"index-{sha256_of_bytes(selection.encode())[:32]}"

    def open(self, shard: ShardEntry | ManifestShard) -> FileIO:
        """The file of a shard, fetched if need be; nobody evicts it while it is open."""
        path = self._path(shard)
        with suppress(FileNotFoundError):
            return self._cached(path, shard)
        turnstile = self.cache / f".{path.name[:2]}.lock"
        os.close(open_no_link(turnstile, os.O_RDWR | os.O_CREAT))
        with locked(turnstile):  # so that of several processes one fetches and the others wait
            with suppress(FileNotFoundError):
                return self._cached(path, shard)
            self._make_room(shard)
            file = self._attempt(f"{self.url}/{shard.name}", lambda: self._fetch(shard, path))
        self.verified.add(_identity(path, file))
        self._make_room()  # for what others fetched meanwhile
        return file

    def _cached(self, path: Path, shard: ShardEntry | ManifestShard) -> FileIO:
        """The file of a shard in the cache, hashed at its first use in a run; FileNotFoundError without a good one."""
        file = _hold(path, shard.bytes)
        if shard.sha256 and _identity(path, file) not in self.verified:
            if sha256_of(file) != shard.sha256:
                file.close()
                path.unlink(missing_ok=True)
                raise FileNotFoundError
            self.verified.add(_identity(path, file))
        return file

    def catalogue(self) -> Catalogue:
        """The index of the shards there, made from one pass over all of them where there is none."""
        content = self._attempt(f"{self.url}/{MANIFEST_FILE}", self._manifest)
        checksum = None if content is None else sha256_of_bytes(content)
        if checksum is not None:
            found = read_catalogue(self.place)
            if found is not None and found.manifest == checksum:
                return found
        shards, manifest = self._listed(content)
        with locked(self.place):
            known = read_catalogue(self.place) or self._build_index(shards)
            self._compare(known.table, shards)
            if manifest is None:
                return Catalogue(known.table)
            class_names = None if manifest.class_names is None else tuple(manifest.class_names)
            catalogue = Catalogue(known.table, checksum, class_names)
            write_catalogue(self.place, catalogue)
        return catalogue

    def _listed(self, content: bytes | None) -> tuple[Sequence[ManifestShard], Manifest | None]:
        """What the manifest names, else (not over http) the .tar files there; sha256 is "" where it is unknown."""
        manifest = None if content is None else parse_manifest(content, f"{self.url}/{MANIFEST_FILE}")
        if manifest is None and is_http(self.url):
            raise DataError(
                f"'{self.url}' has no {MANIFEST_FILE} of make_shards; over http it is needed to list the shards. "
                f"{MAKE_MANIFEST}"
            )
        shards = self._attempt(self.url, self._listing) if manifest is None else manifest.shards
        for shard in shards:
            if not (_is_plain(shard.name) and isinstance(shard.bytes, int) and isinstance(shard.sha256, str)):
                raise damaged_manifest(f"{self.url}/{MANIFEST_FILE}", f"it lists {shard.name!r}, which is not a shard")
        if not shards:
            raise DataError(f"'{self.url}' holds no .tar shard. Make some: python -m data_tools.make_shards --help")
        return sorted(shards, key=lambda shard: shard.name), manifest

    def _compare(self, table: ShardTable, shards: Sequence[ManifestShard]) -> None:
        """Raise DataError unless the listed shards are those of the index."""
        known = {entry.name: entry for entry in table}
        for name in known.keys() ^ {shard.name for shard in shards}:
            raise DataError(
                f"Shard '{name}' was added to or removed from '{self.url}' since it was indexed. If that is meant, "
                f"delete '{self.place}' to index again."
            )
        for shard in shards:
            entry = known[shard.name]
            if shard.bytes != entry.bytes or shard.sha256 not in ("", entry.sha256):
                raise shard_changed(f"{self.url}/{shard.name}", self.place)

    def _path(self, shard: ShardEntry | ManifestShard) -> Path:
        key = sha256_of_bytes(f"{self.url}/{shard.name} {shard.bytes}".encode())
        return self.cache / f"{key[:32]}-{shard.name}"

    def _build_index(self, shards: Sequence[ManifestShard]) -> Catalogue:
        say_if_made_again(self.place)
        entries = []
        total = sum(shard.bytes for shard in shards)
        description, interval = "fetching and indexing shards", bar_interval()
        with tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, mininterval=interval) as bar:
            for shard in shards:
                with self.open(shard):
                    entry, rows = index_shard(self._path(shard), shard.name, image_key=self.image_key)
                write_rows(self.place, shard.name, rows)
                entries.append(replace(entry, modified_ns=0))
                bar.update(shard.bytes)
        if not any(entry.samples for entry in entries):
            raise no_samples(self.url, entries)
        catalogue = Catalogue(ShardTable.of(entries))
        write_catalogue(self.place, catalogue)
        return catalogue

    def _manifest(self) -> bytes | None:
        system, folder = _connect(self.url, os.getpid())
        with TemporaryDirectory(prefix=".manifest-", dir=self.place) as aside:
            local = Path(aside) / MANIFEST_FILE
            try:
                _download(system, f"{folder}/{MANIFEST_FILE}", local, MAX_MANIFEST_BYTES)
            except FileNotFoundError:
                return None
            return local.read_bytes()

    def _listing(self) -> list[ManifestShard]:
        system, folder = _connect(self.url, os.getpid())
        system.invalidate_cache()
        files = [(file["name"].rsplit("/", 1)[-1], file["size"]) for file in system.ls(folder, detail=True)]
        return [ManifestShard(name, 0, size, "") for name, size in files if _is_plain(name)]

    def _fetch(self, shard: ShardEntry | ManifestShard, path: Path) -> FileIO:
        system, folder = _connect(self.url, os.getpid())
        name = quote(shard.name) if is_http(self.url) else shard.name
        with written_whole(path, durable=False) as aside:
            _download(system, f"{folder}/{name}", aside, shard.bytes)
            if (size := aside.stat().st_size) != shard.bytes:
                raise OSError(f"it arrived with {size} bytes instead of {shard.bytes}; fetched in part, or changed")
            if shard.sha256 and sha256_of(aside) != shard.sha256:
                raise OSError("it arrived with another SHA-256 than expected; damaged on the way, or changed")
            return _hold(aside, shard.bytes)

    def _attempt(self, url: str, action: Callable[[], Result]) -> Result:
        """`action()`, retried after temporary failures; any error becomes one sentence."""
        for pause in (*RETRY_AFTER, None):
            try:
                return action()
            except Exception as error:  # each file system has exceptions of its own
                if pause is None or not _may_pass(error):
                    raise self._explain(url, error) from None
            time.sleep(pause)
        raise AssertionError

    def _explain(self, url: str, error: Exception) -> DataError:
        if isinstance(error, ImportError):
            return DataError(
                f"'{url}' needs a package that is not installed: pip install "
                f"{PACKAGES.get(_protocol(url), f'what fsspec asks for ({error})')}"
            )
        if isinstance(error, FileNotFoundError):
            return DataError(f"There is no '{url}'.")
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return DataError(
                f"The disk of the shard cache '{self.cache}' is full. Lower data.cache_gb, or set data.cache_dir to a "
                "directory on a larger one."
            )
        reason = (str(error).splitlines() or [""])[0].rstrip(". ") or type(error).__name__
        return DataError(f"Cannot fetch '{url}': {reason}.")

    def _make_room(self, shard: ShardEntry | ManifestShard | None = None) -> None:
        """Evict the least recently used shards, but none in use, until the cache (with `shard`) keeps its limit."""
        if shard is not None and shard.bytes > self.cache_bytes:
            raise DataError(
                f"Shard '{self.url}/{shard.name}' has {shard.bytes / 1e9:.3g} GB, more than data.cache_gb="
                f"{self.cache_bytes / 1e9:g}. Raise it."
            )
        files = list[tuple[float, int, Path]]()
        for path in self.cache.iterdir():
            with suppress(FileNotFoundError):
                if CACHED.fullmatch(path.name):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files) + (0 if shard is None else shard.bytes)
        for used, size, path in sorted(files):
            partial = path.name.endswith(".tmp")
            abandoned = partial and time.time() - used > ABANDONED
            if abandoned or (total > self.cache_bytes and not partial and not _in_use(path)):
                path.unlink(missing_ok=True)  # whoever has just opened it can still read it
                total -= size


def open_remote(url: str, *, cache_dir: Path | None, cache_gb: float, image_key: str | None = None) -> RemoteShards:
    """The shards below a URL; nothing in it is expanded, chained or run."""
    if "::" in url or any(sign in url for sign in "*?#"):
        raise DataError(f"'{url}' must be the plain URL of a directory, such as s3://bucket/train.")
    folder = user_cache() / "shards" if cache_dir is None else cache_dir
    remote = RemoteShards(url.rstrip("/"), folder.absolute(), int(cache_gb * 1e9), image_key)
    try:
        remote.place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The shard cache '{folder}' cannot be made: {error.strerror}. Set data.cache_dir to a directory that you "
            "can write to."
        ) from None
    if not os.access(folder, os.W_OK):
        raise DataError(
            f"The shard cache '{folder}' cannot be written. Set data.cache_dir to a directory that you can write to."
        )
    return remote


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _is_plain(name: object) -> bool:
    """Whether a remote name is that of a .tar file directly in this folder."""
    return isinstance(name, str) and re.fullmatch(r"[^./\\\0][^/\\\0]*\.tar", name) is not None


@cache
def _connect(url: str, process: int) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path there: one per process, since a fork cannot use its parent's connections.

    Here, and not in fsspec's own cache, because a fork that dropped its parent's would wait a second to close it.
    """
    options: dict[str, object] = {"skip_instance_cache": True}
    if is_http(url):
        import aiohttp  # type: ignore[import-not-found, unused-ignore]

        # aiohttp's own limit is five minutes for the whole of a shard
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    return fsspec.core.url_to_fs(url, **options)


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status >= 500 or status in (408, 429)
    lasting = isinstance(error, (DataError, ImportError, FileNotFoundError, PermissionError, ValueError))
    return not lasting and not (isinstance(error, OSError) and error.errno in NO_SPACE)


class _Limits(Callback):
    """Ends a download that brings more bytes than expected, or takes too long for them."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.received = self.before = 0
        self.since = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        self.received += inc
        if self.received > self.max_bytes:
            raise DataError(f"it sends more than the limit of {self.max_bytes:,} bytes")
        now = time.monotonic()
        if now - self.since >= RATE_SECONDS:
            rate = (self.received - self.before) / (now - self.since)
            if rate < LEAST_RATE:
                raise OSError(
                    f"it arrived at {rate / 1e3:.3g} kB/s; below {LEAST_RATE / 1e3:g} counts as no connection"
                )
            self.since, self.before = now, self.received


def _download(system: fsspec.AbstractFileSystem, remote: str, local: Path, max_bytes: int) -> None:
    """Fetch a file; DataError if there are more than `max_bytes`, OSError if they come too slowly."""
    system.get_file(remote, str(local), callback=_Limits(max_bytes))
    if local.stat().st_size > max_bytes:  # of a file system that reports nothing meanwhile
        raise DataError(f"it has more than the limit of {max_bytes:,} bytes")


def _identity(path: Path, file: FileIO) -> tuple[str, int]:
    return path.name, os.fstat(file.fileno()).st_ino


def _hold(path: Path, size: int) -> FileIO:
    """Open a file of the cache as one in use; FileNotFoundError if it is not there, or not whole."""
    if path.is_symlink():  # never created here
        path.unlink(missing_ok=True)
    file = FileIO(open_no_link(path, os.O_RDONLY))
    if os.fstat(file.fileno()).st_size != size:  # a power cut
        file.close()
        path.unlink(missing_ok=True)
        raise FileNotFoundError
    with suppress(OSError):  # no locks here: then it may be evicted, and yet be read to the end
        lock(file, shared=True, wait=False)
    with suppress(OSError):
        os.utime(file.fileno())
    return file


def _in_use(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return not lock(file, wait=False)
    return False

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from torch.testing import assert_close

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.open import DataError, ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, StreamBatch, open_stream

GROUPS = {"view": ViewGroup(count=2, size=8)}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.data.shards.remote.RETRY_AFTER", (0.01, 0.01))


@pytest.fixture
def listed(shards: Path) -> Path:
    """The shards with their manifest."""
    describe(shards)
    return shards


def describe(folder: Path) -> None:
    tars = {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    entries = [ManifestShard(name, 0, len(data), hashlib.sha256(data).hexdigest()) for name, data in tars.items()]
    write_manifest(folder, Manifest(("a", "b", "c", "d"), entries))


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback and notes what was asked for; `truncated` answers break off half-way."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.truncated = self.unavailable = 0
        self.sent = 0
        self.endless = self.slow = ""  # the end of a path
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.endswith(".tar") and self.server.unavailable:
            self.server.unavailable -= 1
            self.send_error(503)
        elif self.path.endswith(".tar") and self.server.truncated:
            self.server.truncated -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        elif self.server.endless and self.path.endswith(self.server.endless):
            self.send(bytes(100_000), times=10_000, pause=0)
        elif self.server.slow and self.path.endswith(self.server.slow):
            self.send(b"x", times=1000, pause=0.02)
        else:
            super().do_GET()

    def send(self, piece: bytes, *, times: int, pause: float) -> None:
        """Pieces without end, so to speak; the client goes away at some time."""
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            for _ in range(times):
                self.wfile.write(piece)
                self.wfile.flush()
                self.server.sent += len(piece)
                time.sleep(pause)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(listed: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    with Server(listed) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture(params=["file", "memory", "http"])
def url(request: pytest.FixtureRequest, listed: Path) -> Iterator[str]:
    """The shards of `listed` as each kind of file system shows them."""
    if request.param == "file":
        yield f"file://{listed}"
    elif request.param == "http":
        yield request.getfixturevalue("server").url
    else:
        memory = fsspec.filesystem("memory")
        memory.put(str(listed), "/set", recursive=True)
        yield "memory://set"
        memory.rm("/set", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.tar"), key=lambda path: path.name.split("-", 1)[1])


def gigabytes(size: int) -> float:
    return (size + 0.5) / 1e9


def batches(index: ShardIndex, workers: int) -> list[StreamBatch]:
    config = DataConfig(shards="", batch_size=4, block_shards=2, workers=workers)
    stream = open_stream(index, GROUPS, config, seed=0, position=0, rank=0, world_size=1, batches=6)
    return [batch.clone() for batch in stream]


def test_the_index_is_that_of_the_directory(url: str, listed: Path, cache: Path) -> None:
    remote, local = open_shards(f"{url}/", cache_dir=cache), open_shards(listed)
    assert remote.shard_counts.tolist() == local.shard_counts.tolist() == [7, 5, 8]
    assert remote.class_names == local.class_names == ("a", "b", "c", "d")
    assert remote.labels().tolist() == local.labels().tolist()
    assert remote.has_labels
    for number in range(20):
        here, there = local.read(number), remote.read(number)
        assert (here.image, here.label, here.location) == (there.image, there.label, there.location)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_directory(url: str, listed: Path, cache: Path, workers: int) -> None:
    index = open_shards(url, cache_dir=cache)
    for path in cached(cache):
        path.unlink()  # so that the workers have to fetch
    for remote, local in zip(batches(index, workers), batches(open_shards(listed), 0), strict=True):
        assert remote.sample_ids.tolist() == local.sample_ids.tolist()
        assert_close(remote.crops["view"], local.crops["view"], rtol=0, atol=0)
        assert_close(remote.draws["view"], local.draws["view"], rtol=0, atol=0)
    assert len(cached(cache)) == 3


def test_each_shard_crosses_the_network_once(server: Server, cache: Path) -> None:
    batches(open_shards(server.url, cache_dir=cache), workers=2)
    batches(open_shards(server.url, cache_dir=cache), workers=0)
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(tars) == ["/part-000000.tar", "/part-000001.tar", "/part-000002.tar"]


def test_only_the_shards_that_are_read_are_fetched(listed: Path, cache: Path) -> None:
    index = open_shards(f"file://{listed}", cache_dir=cache)
    for path in cached(cache):
        path.unlink()
    assert pickle.loads(pickle.dumps(index)).read(8).label == 0
    assert [path.name.split("-", 1)[1] for path in cached(cache)] == ["part-000001.tar"]


def test_an_index_of_an_earlier_format_is_made_again(
    listed: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{listed}"
    open_shards(url, cache_dir=cache)
    (path,) = cache.glob("index-*/index.json")
    content = json.loads(path.read_text())
    for name in ("image_bytes", "pixel_bytes", "widest"):
        del content["shards"][name]
    path.write_text(json.dumps(content | {"format": 2}))
    assert open_shards(url, cache_dir=cache).sizes([7]).tolist() == [[10, 12]]
    (line,) = caplog.messages
    assert line.endswith("is from an earlier version and is rebuilt.")


def test_a_file_system_that_can_list_needs_no_manifest(shards: Path, cache: Path) -> None:
    (shards / "notes.txt").touch()
    index = open_shards(f"file://{shards}", cache_dir=cache)
    assert (len(index), index.class_names) == (20, None)
    (shards / "part-000003.tar").write_bytes((shards / "part-000000.tar").read_bytes())
    with pytest.raises(DataError, match=r"'part-000003\.tar' was added to or removed from 'file://.*'"):
        open_shards(f"file://{shards}", cache_dir=cache)


def test_eviction_keeps_the_bound_and_takes_what_was_used_longest_ago(listed: Path, cache: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(listed.glob("*.tar"))]
    other = cache / "my-own.tar"
    cache.mkdir()
    other.write_bytes(b"x" * 100_000)
    index = open_shards(f"file://{listed}", cache_dir=cache, cache_gb=gigabytes(sizes[0] + sizes[2]))
    for sample in (0, 19, 8, 1, 18, 9, 0, 19):
        expected = open_shards(listed).read(sample)
        assert index.read(sample).image == expected.image
        files = [path for path in cached(cache) if path != other]
        assert sum(path.stat().st_size for path in files) <= sizes[0] + sizes[2]
        assert expected.shard in [path.name.split("-", 1)[1] for path in files]
    assert other.exists()


def test_a_shard_in_use_is_not_evicted(listed: Path, cache: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(listed.glob("*.tar"))]
    bound = gigabytes(sizes[0] + sizes[2])
    first, second = (open_shards(f"file://{listed}", cache_dir=cache, cache_gb=bound) for _ in range(2))
    first.read(0)
    held = cached(cache)[0]
    for sample in (19, 8, 18, 9):
        second.read(sample)
        assert held.exists()
    for index in (first, second):
        index._shards.files.clear()  # closes them
    cached(cache)[1].unlink()
    second.read(8)
    assert not held.exists()
    assert first.read(1).label == 1  # fetched again


def test_a_cache_too_small_for_a_shard_or_a_block_is_an_error(listed: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"more than data\.cache_gb=1e-09"):
        open_shards(f"file://{listed}", cache_dir=cache, cache_gb=1e-9)
    largest = max(path.stat().st_size for path in listed.glob("*.tar"))
    index = open_shards(f"file://{listed}", cache_dir=cache, cache_gb=gigabytes(largest))
    with pytest.raises(DataError, match=r"A block of data\.block_shards=2 shards of 'file://"):
        batches(index, 0)


def failing(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str], None], times: int) -> list[str]:
    """Make the first `times` downloads of shards go through `spoil(local path)`; returns the list of all of them."""
    fetched: list[str] = []
    get_file = LocalFileSystem.get_file

    def get(system: LocalFileSystem, remote: str, local: str, **options: object) -> None:
        get_file(system, remote, local, **options)
        if not remote.endswith(".tar"):
            return
        fetched.append(Path(remote).name)
        if len(fetched) <= times:
            spoil(local)

    monkeypatch.setattr(LocalFileSystem, "get_file", get)
    return fetched


def flip(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[600] ^= 1
    Path(path).write_bytes(data)


def raises(error: Exception) -> Callable[[str], None]:
    def spoil(path: str) -> None:
        raise error

    return spoil


def test_half_a_download_is_refused_and_tried_again(listed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spoil in (lambda path: os.truncate(path, 1000), flip, raises(ConnectionResetError("reset"))):
        shutil.rmtree(cache, ignore_errors=True)
        with monkeypatch.context() as patch:
            fetched = failing(patch, spoil, times=2)
            assert len(open_shards(f"file://{listed}", cache_dir=cache)) == 20
        assert fetched.count("part-000000.tar") == 3
        assert list(cache.glob("*.tmp")) + list(cache.glob(".*.tmp")) == []


def test_a_broken_connection_is_tried_again_over_http(server: Server, cache: Path) -> None:
    server.truncated, server.unavailable = 1, 1
    assert len(open_shards(server.url, cache_dir=cache)) == 20
    assert server.asked.count("/part-000000.tar") == 3
    server.truncated = 3
    for path in cached(cache):
        path.unlink()
    with pytest.raises(DataError, match=r"^Cannot fetch 'http://127\.0\.0\.1:\d+/part-000000\.tar': [^\n]*$"):
        open_shards(server.url, cache_dir=cache).read(0)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda path: os.truncate(path, 1000),
            r"Cannot fetch .*part-000000\.tar': it arrived with 1000 bytes instead of",
        ),
        (flip, "it arrived with another SHA-256"),
        (raises(OSError(errno.ENOSPC, "No space left on device")), r"The disk of the shard cache .* is full"),
        (raises(PermissionError(errno.EACCES, "Permission denied")), "Permission denied"),
        (raises(RuntimeError("no\ncredentials")), "Cannot fetch .*: no.$"),
    ],
)
def test_what_stays_wrong_is_one_sentence(
    listed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str], None], sentence: str
) -> None:
    failing(monkeypatch, spoil, times=3)
    with pytest.raises(DataError, match=sentence):
        open_shards(f"file://{listed}", cache_dir=cache)
    assert cached(cache) == []


def test_a_remote_shard_that_changed_is_an_error(listed: Path, cache: Path) -> None:
    url = f"file://{listed}"
    index = open_shards(url, cache_dir=cache)
    flip(str(listed / "part-000001.tar"))
    for path in cached(cache):
        path.unlink()
    with pytest.raises(DataError, match=r"part-000001\.tar': it arrived with another SHA-256"):
        index.read(8)
    describe(listed)
    with pytest.raises(DataError, match=r"part-000001\.tar' changed since it was indexed\. .* delete '.*index-"):
        open_shards(url, cache_dir=cache)
    (listed / MANIFEST_FILE).unlink()
    os.truncate(listed / "part-000002.tar", 1000)
    with pytest.raises(DataError, match=r"part-000002\.tar' changed since it was indexed"):
        open_shards(url, cache_dir=cache)


def test_a_file_of_the_cache_that_a_power_cut_shortened_is_fetched_again(listed: Path, cache: Path) -> None:
    open_shards(f"file://{listed}", cache_dir=cache)
    os.truncate(cached(cache)[0], 0)
    assert open_shards(f"file://{listed}", cache_dir=cache).read(0).label == 0


def test_same_names_from_two_places_are_two_files(listed: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(listed, tmp_path / "other", ignore=shutil.ignore_patterns(".index"))
    for folder in (listed, tmp_path / "other"):
        open_shards(f"file://{folder}", cache_dir=cache)
    assert len(cached(cache)) == 6


def test_processes_share_a_download(server: Server, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ssl_pipeline.data.shards.open import open_shards; "
        f"index = open_shards({server.url!r}, cache_dir=Path({str(cache)!r})); sys.stdin.read(1); "
        "print(sum(len(index.read(sample).image) for sample in range(20)))"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate(b"x", timeout=60)[0] for process in processes]
    assert printed[0] == printed[1] != b""
    assert len([path for path in server.asked if path.endswith(".tar")]) == 3
    assert list(cache.glob(".*.tmp")) == []


def test_missing_things_are_named(server: Server, listed: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"/nothing' has no manifest\.json of make_shards; over http"):
        open_shards(f"{server.url}/nothing", cache_dir=cache)
    (listed / "part-000001.tar").unlink()
    with pytest.raises(DataError, match=r"^There is no 'http://127\.0\.0\.1:\d+/part-000001\.tar'\.$"):
        open_shards(server.url, cache_dir=cache)
    assert server.asked.count("/part-000001.tar") == 1
    with pytest.raises(DataError, match=r"^There is no 'file://.*/nothing'\.$"):
        open_shards(f"file://{listed}/nothing", cache_dir=cache)


def test_an_unreachable_host_is_one_sentence(cache: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(DataError, match=r"^Cannot fetch 'http://127\.0\.0\.1:9/manifest\.json': [^\n]*$"):
        open_shards("http://127.0.0.1:9", cache_dir=cache)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"not installed: pip install {package}$"):
        open_shards(f"{scheme}://bucket/train", cache_dir=cache)


@pytest.mark.parametrize("name", ["../up.tar", "/etc/passwd", "a/b.tar", ".hidden.tar", "a.zip", "a\\b.tar"])
def test_a_manifest_names_plain_files_alone(listed: Path, cache: Path, name: str) -> None:
    write_manifest(listed, Manifest(None, [ManifestShard(name, 1, 1, "")]))
    with pytest.raises(DataError, match="which is not a shard"):
        open_shards(f"file://{listed}", cache_dir=cache)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {}",
        "pipe:touch {} #://x",
        "x://$(touch {})",
        "simplecache::file://{}",
        "file:///a/*.tar",
        "nope://x",
    ],
)
def test_a_url_runs_nothing_and_expands_nothing(url: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError):
        open_shards(url.format(tmp_path / "ran"), cache_dir=cache)
    assert not (tmp_path / "ran").exists()


def test_environment_variables_stay_as_they_are(listed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", str(listed))
    with pytest.raises(DataError, match=r"There is no 'file://\$\{WHERE\}'"):
        open_shards("file://${WHERE}", cache_dir=cache)


def test_a_cache_that_cannot_be_made_is_an_error(listed: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be made: .* Set data\.cache_dir"):
        open_shards(f"file://{listed}", cache_dir=listed / MANIFEST_FILE)


def test_the_cache_is_the_users_by_default(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_shards(f"file://{listed}")
    assert len(cached(tmp_path / "ssl_pipeline" / "shards")) == 3


def test_a_server_cannot_send_more_than_the_manifest_says(server: Server, cache: Path) -> None:
    server.endless = "part-000001.tar"
    with pytest.raises(
        DataError, match=r"^Cannot fetch '.*part-000001\.tar': it sends more than the limit of [\d,]+ bytes"
    ):
        open_shards(server.url, cache_dir=cache)
    assert server.asked.count("/part-000001.tar") == 1
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 20e6
    assert not list(cache.glob("*part-000001*"))


@pytest.mark.parametrize("kind", ["http", "file"])
def test_a_manifest_has_an_end(
    server: Server, listed: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.endless = "manifest.json"
    monkeypatch.setattr("ssl_pipeline.data.shards.remote.MAX_MANIFEST_BYTES", 500)
    with pytest.raises(DataError, match=r"manifest\.json': it (sends|has) more than the limit of 500 bytes"):
        open_shards(server.url if kind == "http" else f"file://{listed}", cache_dir=cache)
    assert not list(cache.rglob("*manifest*"))
    assert server.sent < 500e6


@pytest.mark.parametrize("slow", ["manifest.json", "part-000001.tar"])
def test_a_server_slower_than_the_least_rate_is_given_up(
    server: Server, cache: Path, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.slow = slow
    monkeypatch.setattr("ssl_pipeline.data.shards.remote.RATE_SECONDS", 0.1)
    with pytest.raises(DataError, match=rf"{slow}': it arrived at 0\.0\d+ kB/s; below 10 counts as no connection"):
        open_shards(server.url, cache_dir=cache)
    assert server.asked.count(f"/{slow}") == 3


def test_a_file_of_the_cache_is_hashed_at_its_first_use_in_a_run(
    listed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_shards(f"file://{listed}", cache_dir=cache)
    image = index.read(8).image
    flip(str(cached(cache)[1]))
    assert index.read(0).image == open_shards(listed).read(0).image
    fetched = failing(monkeypatch, lambda path: None, times=0)
    again = open_shards(f"file://{listed}", cache_dir=cache)  # another run
    assert again.read(8).image == image
    assert fetched == ["part-000001.tar"]
    hashed: list[object] = []
    monkeypatch.setattr("ssl_pipeline.data.shards.remote.sha256_of", lambda file: hashed.append(file))
    for number, open_files in enumerate((1, 0, 1)):
        again._shards.files.clear()
        assert (number, again.read(8).image) == (number, image)
        assert (open_files, hashed) == (open_files, [])


def test_links_in_the_cache_are_not_followed(listed: Path, cache: Path, tmp_path: Path) -> None:
    open_shards(f"file://{listed}", cache_dir=cache)
    path, stranger = cached(cache)[1], tmp_path / "stranger.tar"
    path.rename(stranger)
    path.symlink_to(stranger)
    before = stranger.stat().st_mtime_ns
    again = open_shards(f"file://{listed}", cache_dir=cache)
    assert again.read(8).label == 0
    assert not path.is_symlink()
    assert stranger.stat().st_mtime_ns == before
    path.unlink()
    (cache / f".{path.name[:2]}.lock").unlink(missing_ok=True)
    (cache / f".{path.name[:2]}.lock").symlink_to(tmp_path / "planted")
    with pytest.raises(DataError, match="is a symbolic link, which is not followed here; delete it"):
        open_shards(f"file://{listed}", cache_dir=cache).read(8)
    assert not (tmp_path / "planted").exists()

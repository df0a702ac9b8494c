"""Shards in a bucket: s3fs against a server on the loopback that speaks as much of S3 as reading needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from ssl_pipeline.data.shards.open import DataError, open_shards
from tests.tiny import write_shards

BUCKET = "images"
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class Bucket(BaseHTTPRequestHandler):
    """ListObjectsV2, HEAD and GET (with a range) of the files below a folder; other buckets are not there."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != BUCKET:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
        elif not key:
            self._answer(200, self._listing(parse_qs(parts.query)))
        elif (self.folder / key).is_file():
            self._file((self.folder / key).read_bytes())
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        files = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
        found = {key: path for key, path in sorted(files.items()) if key.startswith(prefix)}
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            f"<Size>{path.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, path in found.items()
        )
        head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
        text = f"<ListBucketResult {NAMESPACE}>{head}<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        return text.encode()

    def _file(self, content: bytes) -> None:
        wanted = self.headers.get("Range", "")
        if not wanted:
            self._answer(200, content)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last) + 1, len(content)) if last else len(content)
        self._answer(206, content[int(first) : end], {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"})

    def _answer(self, status: int, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"ETag": '"x"', "Content-Length": str(len(content)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of what is in the bucket."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install 'ssl-pipeline[remote]'")
    folder = tmp_path / "bucket"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Bucket, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setattr("ssl_pipeline.data.shards.remote.RETRY_AFTER", (0.01, 0.01))
    s3fs.S3FileSystem.clear_instance_cache()
    yield folder
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()


def test_shards_in_a_bucket_are_those_on_the_disk(bucket, tmp_path):
    local = open_shards(write_shards(bucket / "photos" / "train", (7, 5)))
    remote = open_shards(f"s3://{BUCKET}/photos/train", cache_dir=tmp_path / "cache")
    assert len(remote) == len(local) == 12
    assert remote.labels().tolist() == local.labels().tolist()
    for sample in range(12):
        assert remote.read(sample).image == local.read(sample).image


def test_a_bucket_and_a_folder_that_are_not_there_are_told_in_one_line(bucket, tmp_path):
    for url in (f"s3://{BUCKET}/none", "s3://nobody/none"):
        with pytest.raises(DataError) as error:
            open_shards(url, cache_dir=tmp_path / "cache")
        assert url in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.tar import Member, walk

MEMBERS = {"a.jpg": b"x" * 700, "a.cls": b"3", "folder/b.jpg": b"", "b.cls": b"y" * 512}


def members_of(data: bytes) -> list[Member]:
    return list(walk(data, shard="s.tar"))


def tar_of(members: dict[str, bytes], **options: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def oracle(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in archive:
            if info.isfile():
                yield info.name, info.offset_data, archive.extractfile(info).read()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "d" * 60 + "/" + "n" * 60 + ".jpg", "bäckerei/ß.jpg"])
def test_members_are_those_of_tarfile(format: int, name: str) -> None:
    data = tar_of(MEMBERS | {name: b"last"}, format=format)
    found = [(member.name, member.offset, data[member.offset :][: member.size]) for member in members_of(data)]
    assert found == list(oracle(data))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header_are_read(format: int) -> None:
    names = ["x" * 300 + ".jpg", "short.jpg", "y" * 5000 + ".jpg"]
    data = tar_of(dict.fromkeys(names, b"1"), format=format)
    members = members_of(data)
    assert [member.name for member in members] == names
    # reading can start again at any member, long name included
    assert [next(walk(data, shard="s", start=member.start)).name for member in members] == names


def test_directories_are_passed_over() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        folder = tarfile.TarInfo("folder/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("folder/a.jpg"))
    assert [member.name for member in members_of(file.getvalue())] == ["folder/a.jpg"]


@pytest.mark.parametrize("length", [1, 511, 512, 700, 1024, 1535, 1536, 2048, 2500, 3072, 4000])
def test_a_cut_at_any_byte_is_noticed(length: int) -> None:
    data = tar_of(MEMBERS)
    with pytest.raises(DataError, match=r"Shard 's.tar' is truncated: .* byte \d+"):
        members_of(data[:length])


def test_a_cut_after_the_end_marker_is_none() -> None:
    data = tar_of(MEMBERS)
    content_end = max(i for i in range(0, len(data), 512) if any(data[i : i + 512])) + 512
    assert len(members_of(data[: content_end + 512])) == 4


def damaged(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + value + data[position + len(value) :]


def retyped(kind: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        info = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict")
        info.type = kind
        info.linkname = "/etc/passwd"
        return info.tobuf(tarfile.USTAR_FORMAT) + data[512:]

    return change


def resized(field: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged(3, b"z"), "damaged or not a tar file at byte 0: its header checksum is wrong"),
        (damaged(1540, b"z"), "damaged or not a tar file at byte 1536"),
        (damaged(0, b"\x1f\x8b"), "gzip-compressed: unpack it first"),
        (retyped(tarfile.SYMTYPE), "'a.jpg' at byte 0 is a symbolic link"),
        (retyped(tarfile.LNKTYPE), "'a.jpg' at byte 0 is a hard link"),
        (retyped(tarfile.CHRTYPE), "is a device"),
        (retyped(tarfile.FIFOTYPE), "is a pipe"),
        (retyped(b"S"), "of the unknown type b'S'"),
        (resized(b"\xff" * 12), "no valid member size"),
        (resized(b"\x80" + b"\xff" * 11), "is truncated: the member at byte 0 ends at byte 3"),
        (resized(b"77777777777\0"), "is truncated: the member at byte 0"),
        (lambda data: data + tar_of(MEMBERS), "goes on after the end-of-archive marker"),
    ],
)
def test_damage_is_named_with_its_byte(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        members_of(change(tar_of(MEMBERS)))


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (pax(b"99999 path=a\n"), "damaged pax header at byte 512"),
        (pax(b"0 path=a\n"), "damaged pax header"),
        (pax(b"-7 path=a\n"), "damaged pax header"),
        (pax(b"nonsense"), "damaged pax header"),
        (pax(b"14 size=-9999\n"), "no valid member size"),
        (pax(b"24 size=999999999999999\n"), "is truncated"),
        (pax(b"22 GNU.sparse.major=1\n"), "sparse file"),
        (pax(b"11 path=ab\n", b"g"), "sets a path or size for all members"),
        (pax(b"x" * (2 << 20), b"L"), "extended header of 2097152 bytes"),
    ],
)
def test_hostile_extended_headers_are_refused(header: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        members_of(header + tar_of(MEMBERS))


def test_a_comment_for_all_members_is_harmless() -> None:
    assert len(members_of(pax(b"16 comment=hello\n"[:0] + b"17 comment=hello\n", b"g") + tar_of(MEMBERS))) == 4


def test_an_error_never_extracts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members = members_of(tar_of({"/etc/a.jpg": b"1", "../../b.jpg": b"2"}))
    assert [member.name for member in members] == ["/etc/a.jpg", "../../b.jpg"]
    assert not list(tmp_path.iterdir())

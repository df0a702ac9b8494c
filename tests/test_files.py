"""Whole files or none, their checksums, and who holds a lock."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssl_pipeline.files import (
    lock,
    locked,
    open_no_link,
    read_array,
    sha256_of,
    sha256_of_bytes,
    sha256_of_json,
    sha256_of_tensors,
    write_array,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
    written_whole,
)

WRITERS = {
    "bytes": lambda path: write_bytes(path, b"new"),
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, ["new"]),
    "array": lambda path: write_array(path, np.arange(3)),
    "tensors": lambda path: write_tensors(path, {"x": torch.ones(3)}),
}


def test_text_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "first")
    write_text(path, "ß second")
    assert path.read_text(encoding="utf-8") == "ß second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch, operation, writer):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, no_space)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[writer](path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"top1": float("nan"), "all": (1, float("inf"), 0.1), "name": "k-NN"})
    assert json.loads(path.read_text()) == {"top1": None, "all": [1, None, 0.1], "name": "k-NN"}


def test_arrays_and_tensors_are_read_again_by_who_made_the_formats(tmp_path):
    write_array(tmp_path / "ids.npy", np.arange(3, dtype=np.int64))
    assert np.load(tmp_path / "ids.npy", allow_pickle=False).tolist() == [0, 1, 2]
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, metadata={"format": "pt"})
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1, 1]
    mode = (tmp_path / "x.safetensors").stat().st_mode
    assert mode & 0o777 == tmp_path.stat().st_mode & 0o666  # safetensors' own would be its owner's alone
    with pytest.raises(OSError, match=r"cannot write .*y\.safetensors"):
        write_tensors(tmp_path / "nowhere" / "y.safetensors", {"y": torch.ones(2)})


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path):
    def half() -> None:
        with written_whole(tmp_path / "file") as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_every_checksum_is_a_sha256_in_hexadecimal(tmp_path):
    expected = hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb") as file:
        assert sha256_of(file) == sha256_of(tmp_path / "file") == expected
    assert sha256_of_bytes(b"abc") == sha256_of_bytes(b"a", b"", memoryview(b"bc")) == expected
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1})
    assert sha256_of_json(["abc"]) == hashlib.sha256(b'["abc"]').hexdigest()


def test_the_checksum_of_tensors_is_that_of_their_names_and_bytes_as_they_come():
    turned = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T
    tensors = {"b": turned, "a": torch.tensor(7), "half": torch.tensor([1.0], dtype=torch.bfloat16)}
    content = b"b" + np.array([1, 3, 2, 4], dtype="<f4").tobytes() + b"a" + np.array([7]).tobytes() + b"half\x80\x3f"
    assert sha256_of_tensors(tensors) == hashlib.sha256(content).hexdigest()


# locks


def in_fork(question):
    """What a forked process answers."""
    fork = os.fork()
    if fork == 0:
        try:
            os._exit(0 if question() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0


def is_free(path, **how):
    with path.open("r+b") as file:
        return lock(file, wait=False, **how)


@pytest.mark.parametrize("inherited", [True, False])
def test_a_lock_keeps_other_processes_out_until_the_file_is_closed(tmp_path, inherited):
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b") as file:
        assert lock(file, inherited=inherited)
        assert not in_fork(lambda: is_free(path, inherited=inherited))
    assert in_fork(lambda: is_free(path, inherited=inherited))


@pytest.mark.parametrize("inherited", [True, False])
def test_a_shared_lock_lets_others_share(tmp_path, inherited):
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b") as file:
        assert lock(file, shared=True, inherited=inherited)
        assert in_fork(lambda: is_free(path, shared=True, inherited=inherited))
        assert not in_fork(lambda: is_free(path, inherited=inherited))


@pytest.mark.parametrize("inherited", [True, False])
def test_a_fork_holds_the_lock_only_if_it_is_inherited(tmp_path, inherited):
    path = tmp_path / "file"
    path.touch()
    stop, tell_stop = os.pipe()
    ready, tell_ready = os.pipe()
    holder = os.fork()
    if holder == 0:
        file = path.open("r+b")
        lock(file, inherited=inherited)
        if os.fork() == 0:
            os.close(tell_stop)
            os.write(tell_ready, b"1")
            os.read(stop, 1)  # lives on after the holder, until the test ends
        os._exit(0)
    os.waitpid(holder, 0)
    os.read(ready, 1)
    assert in_fork(lambda: is_free(path, inherited=inherited)) == (not inherited)
    for descriptor in (stop, tell_stop, ready, tell_ready):
        os.close(descriptor)


def test_a_directory_can_be_held_and_is_free_afterwards(tmp_path):
    def is_directory_free():
        return lock(os.open(tmp_path, os.O_RDONLY), wait=False)

    with locked(tmp_path):
        assert not in_fork(is_directory_free)
    assert in_fork(is_directory_free)


def test_where_there_are_no_locks_work_goes_on(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path):
        pass
    with pytest.raises(OSError, match="not supported"):
        lock(os.open(tmp_path, os.O_RDONLY))


def test_files_with_a_fixed_name_do_not_follow_links(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "planted")
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with pytest.raises(OSError, match=r"is a symbolic link, which is not followed here; delete it: '.*\.lock'"):
            open_no_link(tmp_path / ".lock", flags)
    assert not (tmp_path / "planted").exists()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / f".name.{os.getpid()}.tmp").symlink_to(tmp_path / "kept")
    write_text(tmp_path / "name", "new")
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "name").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        open_no_link(tmp_path / "nothing", os.O_RDONLY)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_array_is_none_whatever_its_header_says(tmp_path, mapped):
    path = tmp_path / "array.npy"
    write_array(path, np.arange(6))
    assert read_array(path, mapped=mapped).tolist() == [0, 1, 2, 3, 4, 5]
    whole = path.read_bytes()
    for position in range(whole.index(b"}")):
        for byte in b"\x00'({\xff":
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            found = read_array(path, mapped=mapped)
            assert found is None or isinstance(found, np.ndarray)


def test_a_pickle_is_no_array(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert read_array(path, mapped=False) is None


def test_a_shortage_is_not_damage(tmp_path, monkeypatch):
    def load(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(OSError, match="Too many open files"):
        read_array(tmp_path / "array.npy", mapped=True)

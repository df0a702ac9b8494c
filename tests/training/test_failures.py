"""What ends a run from outside is told in its own settings, and its status says failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from ssl_pipeline.config import RunError, validate
from ssl_pipeline.data.shards.catalogue import read_rows
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.training import loop
from ssl_pipeline.training.failures import failures_of
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.run import Run, TrainConfig
from tests.runs import make_run
from tests.tiny import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


def fails(output: Path, shards: Path, error: BaseException, *, at: str) -> RunError | BaseException:
    """What comes out of a run in which `at` of the loop raises the error at its second call."""
    calls = iter((False, *[True] * 9))
    original: Callable = getattr(loop, at)

    def raising(*arguments: object, **named: object) -> object:
        if next(calls):
            raise error
        return original(*arguments, **named)

    with RunDirectory(output) as directory, mock.patch.object(loop, at, raising):
        run = make_run(output, "simclr", shards, directory=directory, steps=3, save_every=1)
        with pytest.raises(type(error) if not isinstance(error, MemoryError | OSError) else RunError) as raised:
            train(run)
    return raised.value


def test_a_run_without_memory_names_what_takes_less(tmp_path, shards):
    told = str(fails(tmp_path, shards, MemoryError(), at="save_run"))
    for part in ("data.batch_size than 8", "train.precision=bf16", "backbone.checkpoint_activations=true"):
        assert part in told
    assert len(told) < 500
    status = read_status(tmp_path)
    assert (status.state, status.reason) == ("failed", told)


def test_what_is_used_already_is_not_proposed(tmp_path, shards):
    run: Run = make_run(tmp_path, "simclr", shards)
    object.__setattr__(run, "train", validate(TrainConfig, {"steps": 1, "precision": "bf16"}))
    told = str(failures_of(run).explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")))
    assert told.startswith("Out of memory (2.50 GiB were asked for) with train.precision=bf16, backbone.checkpoint_")
    assert "instead of no" not in told


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"),
        OSError("cannot write x: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ],
)
def test_a_full_disk_names_the_run_and_its_last_whole_checkpoint(tmp_path, shards, error):
    told = str(fails(tmp_path, shards, error, at="save_run"))
    assert f"he disk of the run {tmp_path} is " in told
    assert "[Errno" not in told
    assert "Its last complete checkpoint is step-00000001; free some space and run the same command again" in told
    assert read_status(tmp_path).state == "failed"


@pytest.mark.parametrize(
    "error", [OSError(errno.EFBIG, os.strerror(errno.EFBIG)), OSError("I/O error: File too large (os error 27)")]
)
def test_a_limit_of_the_size_of_files_names_the_last_whole_checkpoint(tmp_path, shards, error):
    told = str(fails(tmp_path, shards, error, at="save_run"))
    assert f"The run {tmp_path} may not write files as large as it needs" in told
    assert "Its last complete checkpoint is step-00000001; allow larger ones (ulimit -f unlimited) and run" in told


def test_a_full_disk_is_told_where_not_even_the_status_can_be_written(tmp_path, shards):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory(tmp_path) as directory:
        run = make_run(tmp_path, "simclr", shards, directory=directory)
        with mock.patch.object(directory, "status", full), pytest.raises(RunError, match="It has no checkpoint yet"):
            train(run)


def test_an_error_of_nobody_stays_what_it_is_and_the_status_names_its_kind(tmp_path, shards):
    error = fails(tmp_path, shards, KeyError("teacher"), at="save_run")
    assert isinstance(error, KeyError)
    assert read_status(tmp_path).reason.startswith("unexpected KeyError: 'teacher' (from test_failures.py:")


# Shortages of the system


def no_more_files(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_too_many_open_files_is_no_damaged_index(tmp_path):
    index = open_shards(write_shards(tmp_path / "shards"))
    with mock.patch("numpy.load", no_more_files), pytest.raises(OSError, match="Too many open files") as raised:
        read_rows(tmp_path / "shards" / ".index", index.catalogue.table[0])
    assert raised.value.errno == errno.EMFILE


@pytest.mark.parametrize("function", ["sha256_of", "load_file"])
def test_too_many_open_files_is_no_damaged_checkpoint(tmp_path, shards, function):
    train(make_run(tmp_path, "simclr", shards, steps=1, directory=(directory := RunDirectory(tmp_path))))
    directory.__exit__(None, None, None)
    reports: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", report=reports.append)
    with (
        mock.patch(f"ssl_pipeline.run.checkpoint_files.{function}", no_more_files),
        pytest.raises(OSError, match="Too many open files"),
    ):
        checkpoints.load_latest()
    assert reports == []
    assert checkpoints.load_latest() is not None

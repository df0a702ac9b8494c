"""What run.json tells of a start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from ssl_pipeline.run.provenance import commit_of, describe_start


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") is None, "a package below somebody's checkout is not part of it"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) is None


def test_a_start_is_described_by_command_versions_and_hardware() -> None:
    start = describe_start(num_processes=3)
    assert start["command"].startswith(sys.orig_argv[0])
    assert start["versions"]["torch"] == torch.__version__
    assert start["hardware"]["processes"] == 3
    assert json.loads(json.dumps(start)) == start

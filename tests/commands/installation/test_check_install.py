"""`check-install` finds what is broken, says what to try, and is content with this machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssl_pipeline.commands.check_install import CheckInstallConfig, check_install
from ssl_pipeline.commands.installation import devices, host, packages
from ssl_pipeline.data import decode


def states(findings) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_this_installation_can_train(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_install(CheckInstallConfig()) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("This installation can train.\n")
    assert f"torch {torch.__version__}" in shown
    assert list(tmp_path.iterdir()) == []


def test_only_problems_are_shown_on_request(capsys, monkeypatch):
    monkeypatch.setattr(host, "SHARED", Path("/nowhere"))
    monkeypatch.setattr("ssl_pipeline.commands.check_install.CHECKS", (lambda: host.check_shared_memory(host.SHARED),))
    assert check_install(CheckInstallConfig(show="problems")) == 1
    assert capsys.readouterr().out.splitlines() == [
        "WRONG   shared memory: /nowhere cannot be used: [Errno 2] No such file or directory: '/nowhere'",
        "        data.workers=0 works without it; in containers mount /dev/shm.",
        "1 of these must be fixed before training.",
    ]


def test_a_package_that_cannot_be_imported_is_named_with_its_package():
    found = list(packages.check_versions({"torch": "torch", "no_such_module": "no-such-package"}))
    assert states(found)["no-such-package"] == "wrong"
    assert found[-1].advice == "pip install --upgrade no-such-package"


def test_a_missing_extra_is_said_and_is_no_problem():
    (found,) = packages.check_optional({"no_such_module": ("heif", "HEIC photographs are left out")})
    assert (found.state, found.told) == ("ok", "heif (HEIC photographs are left out)")


def test_a_decoder_that_does_not_decode_is_found(monkeypatch):
    monkeypatch.setattr(decode, "decode_jpeg", None)
    monkeypatch.setattr(decode, "FORMATS", ("PNG", "NONE"))
    found = states(packages.check_decoders())
    assert found["NONE images"] == "wrong"
    assert found["JPEG"] == "note"


def test_a_driver_without_a_gpu_that_torch_sees_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (blind,) = devices.check_gpus()
    monkeypatch.setattr(torch.version, "cuda", None)
    (for_cpus,) = devices.check_gpus()
    assert blind.state == for_cpus.state == "wrong"
    assert "CUDA_VISIBLE_DEVICES" in blind.advice
    assert "built for CPUs" in for_cpus.told


def test_a_gpu_that_cannot_compute_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name="G"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 33, 1 << 34))

    def broken(device: torch.device) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED\nadvice of others")

    monkeypatch.setattr(devices, "_train_a_step", broken)
    (found,) = devices.check_gpus()
    assert (found.state, found.what) == ("wrong", "GPU 0")
    assert found.told.startswith("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED (torch")


def test_collectives_that_fail_are_wrong(monkeypatch):
    def broken(backend: str, device: str) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(devices, "_sum_alone", broken)
    (found,) = devices.check_collectives()
    assert (found.state, found.told) == ("wrong", "gloo: no route")


@pytest.mark.parametrize(("megabytes", "state"), [(64, "note"), (4096, "ok")])
def test_little_shared_memory_is_noted(monkeypatch, tmp_path, megabytes, state):
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=megabytes, f_frsize=1 << 20))
    (found,) = host.check_shared_memory(tmp_path)
    assert found.state == state
    assert ("--shm-size" in found.advice) == (state == "note")


def test_few_open_files_are_noted(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 8192))
    (found,) = host.check_open_files()
    assert (found.state, found.advice) == ("note", "Data sets of many shards need more: ulimit -n 8192")


def test_a_directory_that_cannot_be_written_is_wrong(tmp_path):
    (found,) = host.check_disk(tmp_path / "none")
    assert found.state == "wrong"
    (found,) = host.check_disk(tmp_path)
    assert found.state in ("ok", "note")

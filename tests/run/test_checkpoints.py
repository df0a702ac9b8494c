"""Checkpoints: exact, whole or absent under every crash, and damaged ones are refused with a sentence."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ssl_pipeline import __version__
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import sha256_of, sha256_of_json
from ssl_pipeline.optim.lars import LARS
from ssl_pipeline.run import checkpoint_files
from ssl_pipeline.run.checkpoint_files import FormatError
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ssl_pipeline.run.state import CheckpointError, RunState

FORMAT_1 = Path(__file__).parent / "format_1" / "manifest.json"  # of ssl-pipeline 0.1.0


def save(directory, step, *, position=None, keep=2):
    tensors = {"method": {"weight": torch.full((2, 3), float(step))}, "optimizer": {}}
    position = 10 * step if position is None else position
    return Checkpoints(directory, keep=keep).save(at(step, position), tensors)


def at(step, position):
    state = RunState(position, position // step)
    assert state.step == step
    return state


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_every_kind_of_tensor_and_fact_comes_back_as_it_was(tmp_path):
    tied = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "method": {
            "tied.0": tied,
            "tied.1": tied,
            "transposed": tied.T,
            "row": tied[1],
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(3.5),
            "counter": torch.tensor(2**40),
            "mask": torch.tensor([True, False]),
            "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
            "double": torch.tensor([1 / 3], dtype=torch.float64),
            "empty": torch.empty(0, 5),
        },
        "rng": {"cpu": torch.get_rng_state()},
        "optimizer": {},
    }
    saved = Checkpoints(tmp_path).save(RunState(640, 90, {"method": "dino"}), tensors)

    loaded = Checkpoints(tmp_path).load_latest()
    assert loaded.path == saved == tmp_path / "step-00000007"
    assert loaded.state == RunState(640, 90, {"method": "dino"})
    assert loaded.tensors.keys() == tensors.keys()
    for name, entries in tensors.items():
        assert loaded.tensors[name].keys() == entries.keys()
        for key, tensor in entries.items():
            found = loaded.tensors[name][key]
            assert found.dtype == tensor.dtype
            torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)


def test_saving_changes_no_tensor_and_keeps_none(tmp_path):
    weight = torch.ones(3, requires_grad=True)
    Checkpoints(tmp_path).save(at(1, 1), {"method": {"weight": weight}})
    with torch.no_grad():
        weight.fill_(5.0)
    torch.testing.assert_close(Checkpoints(tmp_path).load_latest().tensors["method"]["weight"], torch.ones(3))
    assert weight.requires_grad


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent").load_latest() is None
    (tmp_path / ".tmp-00000001-ab").mkdir()
    assert Checkpoints(tmp_path).load_latest() is None


def test_the_newest_two_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".tmp-00000009-dead").mkdir()
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert Checkpoints(tmp_path).load_latest().state.step == 4


def test_keeping_one_is_refused():
    with pytest.raises(ConfigError, match="at least 2 checkpoints"):
        Checkpoints(Path("anywhere"), keep=1)


def test_position_decides_which_is_newest(tmp_path):
    save(tmp_path, 100, position=6400)
    save(tmp_path, 50, position=12800)  # the batch has grown to four times its size
    assert Checkpoints(tmp_path).load_latest().state.step == 50
    save(tmp_path, 51, position=13056)
    assert names(tmp_path) == ["step-00000050", "step-00000051"]


def test_a_step_number_that_comes_again_loses_nothing(tmp_path):
    save(tmp_path, 100, position=6400)
    save(tmp_path, 100, position=12800)
    assert Checkpoints(tmp_path).load_latest().state.position == 12800
    assert len(names(tmp_path)) == 2
    save(tmp_path, 100, position=12800)  # saved again in the same place: twins are not two checkpoints
    assert len(names(tmp_path)) == 2
    save(tmp_path, 200, position=25600)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]


def test_a_damaged_one_that_is_trained_again_is_replaced(tmp_path):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / "method.safetensors").write_bytes(b"")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert Checkpoints(tmp_path).load_latest().state.step == 2


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / "method.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_others_may_read_what_may_be_read_beside_it(tmp_path):
    saved = save(tmp_path, 1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert modes == {stat.S_IMODE((saved / "manifest.json").stat().st_mode)}


# Damage


def truncate(path):
    file = path / "method.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_byte(path):
    file = path / "method.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def flip_digit_of_a_fact(path):
    manifest = path / "manifest.json"
    manifest.write_text(re.sub(r'"position": 20\b', '"position": 21', manifest.read_text()))


def rewrite_manifest(path, **changes):
    """A manifest whose own hash fits, so that only its content can be refused."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    body.update(changes)
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": sha256_of_json(body)}))


def name_a_file_outside(path):
    shutil.copy(path / "method.safetensors", path.parent / "x.safetensors")
    entry = json.loads((path / "manifest.json").read_text())["files"]["method.safetensors"]
    rewrite_manifest(path, files={"../x.safetensors": entry})


DAMAGES = {
    "truncated file": (truncate, r"method.safetensors has \d+ bytes instead of \d+"),
    "flipped byte": (flip_byte, "method.safetensors is damaged"),
    "missing file": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors: No such"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
    "garbage manifest": (lambda path: (path / "manifest.json").write_bytes(b"\x93NUMPY\xff"), "not a checkpoint's"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "not a checkpoint's"),
    "deep manifest": (lambda path: (path / "manifest.json").write_text("[" * 100_000), "not a checkpoint's"),
    "manifest of another shape": (lambda path: rewrite_manifest(path, files=[1, 2]), "not a checkpoint's"),
    "flipped digit of a fact": (flip_digit_of_a_fact, "manifest.json is damaged"),
    "no position": (lambda path: rewrite_manifest(path, facts={"global_batch": 2}), "its fact 'position' cannot be"),
    "no facts": (lambda path: rewrite_manifest(path, facts=[]), "its facts cannot be read"),
    "path outside": (name_a_file_outside, "its manifest names '../x.safetensors'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_taken(tmp_path, damage):
    destroy, sentence = DAMAGES[damage]
    save(tmp_path, 1)
    destroy(save(tmp_path, 2))
    reports = []
    loaded = Checkpoints(tmp_path, report=reports.append).load_latest()
    assert loaded.state.step == 1
    assert len(reports) == 1
    assert re.search(sentence, reports[0])
    assert "step-00000002 is not used: " in reports[0]
    assert "\n" not in reports[0]
    assert (tmp_path / "step-00000002").exists(), "the evidence stays"


def test_a_run_never_starts_from_zero_over_damaged_checkpoints(tmp_path):
    truncate(save(tmp_path, 1))
    truncate(save(tmp_path, 2))
    reports = []
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoints in .* output=DIR"):
        Checkpoints(tmp_path, report=reports.append).load_latest()
    assert len(reports) == 2


def test_a_checkpoint_of_the_first_format_is_refused_in_one_sentence(tmp_path):
    save(tmp_path, 1)  # is not taken instead: the other may be newer
    old = save(tmp_path, 2)
    shutil.copy(FORMAT_1, old / "manifest.json")
    reports = []
    with pytest.raises(FormatError) as error:
        Checkpoints(tmp_path, report=reports.append).load_latest()
    assert str(error.value) == (
        f"{old} has checkpoint format 1 of ssl-pipeline 0.1.0, and this is ssl-pipeline {__version__}, which reads "
        "formats 2 and 3: go on with ssl-pipeline 0.1.0, or choose another output=DIR."
    )
    assert reports == []


def test_a_checkpoint_of_a_later_format_names_the_version_that_wrote_it(tmp_path):
    rewrite_manifest(save(tmp_path, 1), format=4, versions={"ssl-pipeline": "0.9.0"})
    with pytest.raises(FormatError, match=r"has checkpoint format 4 of ssl-pipeline 0\.9\.0, and this is"):
        Checkpoints(tmp_path).load_latest()


# Read by others


def test_a_part_of_the_files_is_read_whatever_the_others_are(tmp_path):
    newest = save(tmp_path, 1)
    (newest / "optimizer.safetensors").unlink()
    loaded = Checkpoints(tmp_path).load_latest(files=["method"])
    assert loaded.tensors.keys() == loaded.sha256.keys() == {"method"}
    assert loaded.sha256["method"] == sha256_of(newest / "method.safetensors")
    with pytest.raises(CheckpointError, match=r"it has no head\.safetensors"):
        Checkpoints(tmp_path, report=lambda _: None).load_latest(files=["head"])


def test_a_step_is_read_by_its_number(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert Checkpoints(tmp_path).load_step(1).state.step == 1
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3\. It has 1, 2\."):
        Checkpoints(tmp_path).load_step(3)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3\. It has none\."):
        Checkpoints(tmp_path / "absent").load_step(3)


# Crashes


def crash_at(event, crash, monkeypatch):
    """Make the n-th call that touches the disk crash instead; returns the list of calls made so far."""
    calls = []

    def before(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == event:
                crash()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    before(safetensors.torch, "save_file")
    before(os, "fsync")
    before(os, "unlink")  # inside rmtree
    for name in ("mkdir", "rename", "replace", "write_bytes", "chmod"):
        before(Path, name)
    before(shutil, "rmtree")
    return calls


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function):
    """Run `function` in a forked process; returns its wait status (0: it returned)."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


# The directory before, the save that is cut short, the positions that may be newest after it.
SITUATIONS = {
    "a new step": ([(1, 10), (2, 20)], (3, 30)),
    "the same step, renumbered": ([(2, 10)], (2, 20)),
}


def check_nothing_is_lost(directory, older, newer):
    reports = []
    loaded = Checkpoints(directory, report=reports.append).load_latest()
    assert reports == []
    assert loaded.state.position in (older, newer)
    torch.testing.assert_close(loaded.tensors["method"]["weight"], torch.full((2, 3), float(loaded.state.step)))
    for path in directory.glob("step-*"):
        checkpoint_files.load_checkpoint(path)  # whatever has a checkpoint's name is whole


def test_everything_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    calls = crash_at(1_000_000, full_disk, monkeypatch)
    save(tmp_path, 1)
    before = calls[: calls.index("rename")]
    assert before.count("save_file") == 2
    assert before.count("write_bytes") == 1
    assert before.count("replace") == 3
    assert before.count("fsync") == 6  # two tensor files and the manifest, each with the directory
    assert before[-3:] == ["fsync", "replace", "fsync"]
    assert calls[calls.index("rename") + 1] == "fsync"  # the parent, before anything is pruned


@pytest.mark.ddp
@pytest.mark.parametrize("situation", SITUATIONS)
def test_sigkill_at_any_moment_of_a_save_loses_nothing(tmp_path, monkeypatch, situation):
    before, (step, position) = SITUATIONS[situation]
    for event in range(1, 100):
        directory = tmp_path / str(event)
        for old_step, old_position in before:
            save(directory, old_step, position=old_position)

        def child(event=event, directory=directory):
            crash_at(event, kill_myself, monkeypatch)
            save(directory, step, position=position)

        status = in_child(child)
        check_nothing_is_lost(directory, before[-1][1], position)
        save(directory, step + 1, position=position + 10)  # the run goes on
        assert Checkpoints(directory).load_latest().state.position == position + 10
        assert not list(directory.glob(".tmp-*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert event > 12, "the save was not cut short at every moment"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_error_at_any_moment_of_a_save_loses_nothing(tmp_path, situation):
    before, (step, position) = SITUATIONS[situation]
    for event in range(1, 100):
        directory = tmp_path / str(event)
        for old_step, old_position in before:
            save(directory, old_step, position=old_position)
        with pytest.MonkeyPatch.context() as patches:
            calls = crash_at(event, full_disk, patches)
            with contextlib.suppress(OSError):  # what fails once the checkpoint has its name raises nothing
                save(directory, step, position=position)
        check_nothing_is_lost(directory, before[-1][1], position)
        if len(calls) < event:
            break
    assert event > 12, "the save was not cut short at every moment"


def test_a_full_disk_is_an_os_error_and_leaves_no_trace(tmp_path):
    save(tmp_path, 1)

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # the kernel refuses the write
        with pytest.raises(OSError, match=r"cannot write .*method.safetensors"):
            Checkpoints(tmp_path).save(at(2, 20), {"method": {"weight": torch.zeros(10_000)}})

    assert in_child(child) == 0
    assert names(tmp_path) == ["step-00000001"]
    assert Checkpoints(tmp_path).load_latest().state.step == 1


# Optimizers


def make_network():
    generator = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "last": nn.Linear(4, 2)})
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def train(network, optimizer, steps):
    """Deterministic steps in which the last layer has no gradient before step 2 (DINO's frozen prototypes)."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step < 2:
            for parameter in network["last"].parameters():
                parameter.grad = None
        optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "LARS": lambda groups: LARS(groups, lr=0.1),
}


def make_optimizer(name, network):
    groups = [
        {"params": list(network["body"].parameters()), "weight_decay": 0.1},
        {"params": list(network["last"].parameters()), "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name](groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pause", [0, 1, 3])
def test_training_goes_on_bit_for_bit(tmp_path, name, pause):
    straight = make_network()
    train(straight, make_optimizer(name, straight), range(6))

    network = make_network()
    optimizer = make_optimizer(name, network)
    train(network, optimizer, range(pause))
    tensors = {"method": network.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    Checkpoints(tmp_path).save(RunState(pause, 1), tensors)

    loaded = Checkpoints(tmp_path).load_latest()
    resumed = make_network()
    resumed.load_state_dict(loaded.tensors["method"])
    optimizer = make_optimizer(name, resumed)
    load_optimizer_tensors(optimizer, loaded.tensors["optimizer"])
    train(resumed, optimizer, range(pause, 6))
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_state_takes_the_memory_layout_of_its_parameter(tmp_path):
    network = make_network()
    optimizer = make_optimizer("AdamW", network)
    train(network, optimizer, range(3))
    Checkpoints(tmp_path).save(at(3, 3), {"optimizer": optimizer_tensors(optimizer)})
    load_optimizer_tensors(optimizer, Checkpoints(tmp_path).load_latest().tensors["optimizer"])
    weight = network["body"].weight
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert not optimizer.state[weight]["exp_avg"].requires_grad


def test_keys_count_the_parameters_through_all_groups():
    network = make_network()
    optimizer = make_optimizer("AdamW", network)
    train(network, optimizer, range(1))  # the last layer has no gradient yet
    assert set(optimizer_tensors(optimizer)) == {
        f"{index}.{name}" for index in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")
    }


def test_loading_forgets_the_state_that_was_there():
    network = make_network()
    optimizer = make_optimizer("SGD momentum", network)
    train(network, optimizer, range(3))
    load_optimizer_tensors(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


@pytest.mark.parametrize(
    ("key", "shape", "sentence"),
    [
        ("4.exp_avg", (2,), "has an entry '4.exp_avg'; the optimizer has parameters 0 to 3"),
        ("weight.exp_avg", (2,), "has an entry 'weight.exp_avg'"),
        ("-1.exp_avg", (2,), "has an entry '-1.exp_avg'"),
        ("3", (2,), "has an entry '3'"),
        ("3.exp_avg", (5,), r"'3.exp_avg' has shape \(5,\); its parameter has \(2,\)"),
    ],
)
def test_state_of_another_model_is_refused_and_changes_nothing(key, shape, sentence):
    network = make_network()
    optimizer = make_optimizer("AdamW", network)
    train(network, optimizer, range(3))
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    with pytest.raises(CheckpointError, match=sentence):
        load_optimizer_tensors(optimizer, {"0.step": torch.tensor(9.0), key: torch.zeros(shape)})
    after = optimizer_tensors(optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)

"""One run per directory, also after SIGKILL, and status files that a reader can trust."""

import json
import os
import signal
from contextlib import contextmanager

import pytest

from ssl_pipeline.config import ConfigError
from ssl_pipeline.run import directory
from ssl_pipeline.run.directory import RunDirectory, Status, holder_of, read_status


@contextmanager
def trainer(path, *, with_worker=False):
    """A forked process that holds the run directory; with a worker forked from it, as a DataLoader does."""
    ready, tell_ready = os.pipe()
    stop, tell_stop = os.pipe()
    child = os.fork()
    if child == 0:
        run = RunDirectory(path)  # must stay alive
        if not with_worker or os.fork() > 0:
            os.write(tell_ready, b"1")
        os.close(tell_stop)
        os.read(stop, 1)  # returns when the test ends, however it ends
        os._exit(0 if run.path == path else 1)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.close(tell_stop)
        os.waitpid(child, 0)
        for descriptor in (ready, tell_ready, stop):
            os.close(descriptor)


def test_a_directory_in_use_is_refused_with_the_pid(tmp_path):
    path = tmp_path / "runs" / "x"
    with trainer(path) as pid:
        sentence = rf"runs/x is in use by another run \(pid {pid} on .*\). Stop it or choose another output=DIR."
        with pytest.raises(ConfigError, match=sentence):
            RunDirectory(path)
    with RunDirectory(path):
        pass


def test_who_holds_a_directory_is_known_and_asking_does_not_free_it(tmp_path):
    assert holder_of(tmp_path) is None
    with trainer(tmp_path) as pid:
        for _ in range(2):
            assert holder_of(tmp_path) == f"pid {pid} on {os.uname().nodename}"
    assert holder_of(tmp_path) is None
    with RunDirectory(tmp_path):
        pass


def test_a_refused_run_does_not_disturb_the_one_that_holds_the_directory(tmp_path):
    with trainer(tmp_path):
        for _ in range(2):
            with pytest.raises(ConfigError, match="in use"):
                RunDirectory(tmp_path)


def test_a_killed_trainer_sets_its_directory_free_though_its_worker_lives(tmp_path):
    with trainer(tmp_path, with_worker=True) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
        with RunDirectory(tmp_path) as run:
            run.status("running", step=0)


def test_a_worker_that_ends_does_not_free_the_directory(tmp_path):
    with RunDirectory(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.closerange(3, 100)  # all it inherited, the lock's descriptor with it
            os._exit(0)
        os.waitpid(worker, 0)
        other = os.fork()
        if other == 0:
            try:
                RunDirectory(tmp_path)
            except ConfigError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(other, 0)[1] == 0, "a second run got in"


def test_a_file_in_the_place_of_the_directory_is_a_one_line_error(tmp_path):
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(ConfigError, match="must be a directory"):
            RunDirectory(path)


def test_the_layout_is_the_one_that_others_read(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.write_config("seed: 0\n")
        assert run.config_path == tmp_path / "config.yaml"
        assert run.config_path.read_text() == "seed: 0\n"


def test_status_is_what_was_said_last(tmp_path):
    assert read_status(tmp_path) is None
    with RunDirectory(tmp_path) as run:
        run.status("running", step=0)
        run.status("failed", step=12, reason="loss is NaN at step 12")
    status = read_status(tmp_path)
    assert status == Status("failed", 12, "loss is NaN at step 12", status.time, checkpoint=0)
    assert status.time.endswith("+00:00")


@pytest.mark.parametrize("trace", ["config.yaml", "metrics.jsonl", "backbone.safetensors"])
@pytest.mark.parametrize("status", [None, {"checkpoint": 8}, {"state": "done"}, {"checkpoint": None}])
def test_a_run_whose_checkpoints_are_gone_never_starts_over(tmp_path, trace, status):
    (tmp_path / trace).write_text("something")
    if status is not None:
        facts = {"state": "running", "step": 0, "reason": "", "time": "", "checkpoint": 0} | status
        (tmp_path / "status.json").write_text(json.dumps(facts))
    with RunDirectory(tmp_path) as run:
        with pytest.raises(ConfigError, match=f"has {trace} of a run, but no checkpoint to go on from"):
            run.refuse_lost_checkpoints()
        (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
        run.refuse_lost_checkpoints()


def test_a_run_that_had_no_checkpoint_yet_may_begin_again(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.refuse_lost_checkpoints()
        (tmp_path / "metrics.jsonl").write_text("")
        run.refuse_lost_checkpoints()
        (tmp_path / "metrics.jsonl").write_text("{}")
        for state in ("running", "failed", "preempted"):
            run.status(state, step=3)
            run.refuse_lost_checkpoints()


def test_the_end_of_a_start_keeps_what_is_known_of_the_run(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.checkpoint = 8
        run.status("running", step=9)
    with pytest.raises(OSError, match="sudden"), RunDirectory(tmp_path):
        raise OSError("sudden")
    status = read_status(tmp_path)
    assert (status.state, status.step, status.checkpoint) == ("failed", 9, 8)


def test_a_refused_start_leaves_no_empty_directory(tmp_path):
    with pytest.raises(ConfigError), RunDirectory(tmp_path / "runs" / "x"):
        raise ConfigError("no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError), RunDirectory(tmp_path / "mine"):
        raise ConfigError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with RunDirectory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").is_dir()


def test_a_lock_that_is_removed_while_it_is_taken_holds_nothing(tmp_path, monkeypatch):
    taken = []

    def take(descriptor, **options):
        if not taken:
            (tmp_path / ".lock").unlink()
        taken.append(descriptor)
        return True

    monkeypatch.setattr(directory, "lock", take)
    with RunDirectory(tmp_path):
        assert len(taken) == 2
        assert (tmp_path / ".lock").exists()


def test_a_place_where_nothing_can_be_made_is_told(tmp_path, monkeypatch):
    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError  # as /proc answers

    monkeypatch.setattr(directory.Path, "mkdir", none)
    with pytest.raises(ConfigError, match="cannot be made: its file system has no place for it"):
        RunDirectory(tmp_path / "new")


@pytest.mark.parametrize("there", [None, "", "[]", '{"starts": 7}'])
def test_each_start_is_noted(tmp_path, there):
    if there is not None:
        (tmp_path / "run.json").write_text(there)
    with RunDirectory(tmp_path) as run:
        for number in (1, 2):
            run.note_start({"command": f"python pretrain.py seed={number}"})
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["command"][-1] for start in starts] == ["1", "2"]
    assert all(start["time"].endswith("+00:00") for start in starts)


@pytest.mark.parametrize("text", ["", "[]", '{"state": "done"}', "null"])
def test_a_status_file_of_something_else_is_a_one_line_error(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a run's status"):
        read_status(tmp_path)


def test_the_heart_beats_at_most_once_in_a_few_seconds(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(directory.time, "monotonic", lambda: now)
    steps_seen = []
    with RunDirectory(tmp_path) as run:
        for step in range(1, 13):
            run.heartbeat(step=step)
            beat = json.loads((tmp_path / "heartbeat.json").read_text())
            steps_seen.append(beat["step"])
            now += 1.25
    assert steps_seen == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9]
    assert beat["pid"] == os.getpid()

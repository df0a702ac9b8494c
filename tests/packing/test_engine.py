"""The engines give the same results, keep what is done, and say what is missing."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.manifest import read_manifest
from ssl_pipeline.packing import processes, shard_writer
from ssl_pipeline.packing.engine import EngineConfig, Journal, map_tasks
from ssl_pipeline.packing.make_shards import MakeShards, make_shards

ALONE, TWO = EngineConfig(workers=1), EngineConfig(workers=2)


def square(number: int) -> int:
    if number < 0:
        raise DataError(f"{number} has no place here.")
    return number * number


def journal(path: Path, identity: str = "squares") -> Journal[int]:
    return Journal(path, identity, lambda result: result, lambda entry: int(entry))


def mapped(tasks: list[int], engine: EngineConfig, kept: Journal[int] | None = None) -> list[int]:
    return map_tasks(square, tasks, sizes=[1] * len(tasks), engine=engine, description="squares", journal=kept)


@pytest.mark.parametrize("engine", [ALONE, TWO], ids=["alone", "two processes"])
def test_results_are_in_the_order_of_the_tasks(engine):
    assert mapped(list(range(7)), engine) == [0, 1, 4, 9, 16, 25, 36]
    assert mapped([], engine) == []
    with pytest.raises(DataError, match="-1 has no place here"):
        mapped([1, -1], engine)


def process_of(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize(("cores", "workers", "most"), [(1, None, 1), (2, None, 2), (1, 2, 2)])
def test_without_workers_there_are_as_many_as_the_container_has_cores(monkeypatch, cores, workers, most):
    monkeypatch.setattr(processes, "whole_cores", lambda: cores)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 64)
    found = {process for _, process in processes.run_in_processes(process_of, range(20), workers=workers)}
    assert len(found) <= most
    assert (os.getpid() in found) == (most == 1)


def test_what_is_done_is_not_done_again(tmp_path):
    kept = journal(tmp_path / "journal")
    with pytest.raises(DataError):
        mapped([3, 4, -1, 5], ALONE, kept)
    assert kept.read() == {0: 9, 1: 16}
    (tmp_path / "journal").write_text((tmp_path / "journal").read_text().replace("16", "17") + '{"task": 3, "res')
    assert mapped([3, 4, 2, 5], ALONE, kept) == [9, 17, 4, 25], "of the journal, and the rest"
    assert mapped([3, 4, 2, 5], ALONE, journal(tmp_path / "journal", "others")) == [9, 16, 4, 25]


def test_a_start_that_is_killed_as_it_reads_the_journal_loses_nothing(tmp_path, monkeypatch):
    kept = journal(tmp_path / "journal")
    mapped([3, 4], ALONE, kept)
    before = (tmp_path / "journal").read_text()

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(KeyboardInterrupt):
            kept.read()
    assert (tmp_path / "journal").read_text() == before
    assert kept.read() == {0: 9, 1: 16}


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def settings(folder: Path, output: Path, **more: object) -> MakeShards:
    return MakeShards(source=str(folder), prefix="train/", output=output, samples_per_shard=5, workers=1, **more)


def test_make_shards_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch):
    make_shards(settings(folder, tmp_path / "whole" / "out"))
    write, written = shard_writer._write_shard, []

    def fails_at_the_third(*arguments, **packing):
        if len(written) == 2:
            raise DataError("The machine is lost.")
        written.append(write(*arguments, **packing))
        return written[-1]

    monkeypatch.setattr(shard_writer, "_write_shard", fails_at_the_third)
    with pytest.raises(DataError, match="The machine is lost"):
        make_shards(settings(folder, tmp_path / "out", resume=True))
    assert not (tmp_path / "out").exists()
    (unfinished,) = tmp_path.glob(".out.partial-*")
    (unfinished / "..unfinished-shards.123.tmp").touch()  # of a start that was killed as it read its journal
    begun = []

    def noted(*arguments, **packing):
        begun.append(arguments[1][0].name)
        return write(*arguments, **packing)

    monkeypatch.setattr(shard_writer, "_write_shard", noted)
    make_shards(settings(folder, tmp_path / "out", resume=True))
    assert begun == ["out-000002.tar", "out-000003.tar", "out-000004.tar"]
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole" / "out")
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "whole" / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
    assert not list((tmp_path / "out").glob("*unfinished*"))


def test_without_resume_nothing_is_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_write_shard", lambda *_, **__: square(-1))
    with pytest.raises(DataError):
        make_shards(settings(folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def call(folder: Path, output: Path, *arguments: str) -> int:
    argv = [f"source={folder}", "prefix=train/", f"output={output}", *arguments]
    return run_command(MakeShards, make_shards, command="make_shards", argv=argv)


def test_without_ray_its_engine_is_refused_in_a_sentence(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("ssl_pipeline.packing.make_shards.open_source", None)  # before images are looked for
    assert call(folder, tmp_path / "out", "engine=ray") == 2
    told = "error: engine=ray needs Ray: pip install 'ssl-pipeline[ray]'. engine=local works without it.\n"
    assert capsys.readouterr().err.startswith(told)
    assert call(folder, tmp_path / "out", "ray_address=auto") == 2
    assert "ray_address=auto goes with engine=ray." in capsys.readouterr().err


class StuckRay(ModuleType):
    """Stands in for the package on a machine that is too busy: the type of the error is Ray's."""

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...\nmore")


def test_ray_that_does_not_start_in_time_is_told_with_the_ways_around(monkeypatch, capsys):
    stuck = StuckRay("ray")
    stuck.__spec__ = ModuleSpec("ray", None)  # it is looked for before it is imported
    monkeypatch.setitem(sys.modules, "ray", stuck)
    with pytest.raises(ConfigError) as told:
        on_ray([1])
    assert "The current node timed out during startup" in str(told.value)
    assert all(way in str(told.value) for way in ("load", "ray_address=HOST:PORT", "engine=local"))
    assert "\n" not in str(told.value)
    assert "Starting Ray on this machine ...\n" in capsys.readouterr().err


# with Ray


def on_ray(tasks: list[int], kept: Journal[int] | None = None, **more: object) -> list[int]:
    return mapped(tasks, EngineConfig(engine="ray", **more), kept)  # type: ignore[arg-type]


def test_a_cluster_that_does_not_answer_is_named_in_seconds():
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    with pytest.raises(ConfigError, match=r"ray_address=127.0.0.1:9 does not answer \(.*refused.*ray status"):
        on_ray([1], ray_address="127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"ray_address must be auto, HOST:PORT or ray://HOST:PORT\. Got nowhere"):
        on_ray([1], ray_address="nowhere")


def die_once(task: tuple[str, int]) -> int:
    """The process dies at the first try of a task."""
    marker, number = task
    if number == 2 and not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return square(number)


@pytest.mark.slow
def test_ray_gives_the_same_and_does_the_tasks_of_a_dead_process_again(folder, tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        assert on_ray(list(range(9))) == [number**2 for number in range(9)]
        with pytest.raises(DataError, match="-1 has no place here"):
            on_ray([1, -1], journal(tmp_path / "journal"))
        tasks = [(str(tmp_path / "died"), number) for number in range(5)]
        engine = EngineConfig(engine="ray")
        again = map_tasks(die_once, tasks, sizes=[1] * 5, engine=engine, description="squares")
        assert again == [0, 1, 4, 9, 16]
        assert (tmp_path / "died").exists()
        make_shards(settings(folder, tmp_path / "local" / "out"))
        make_shards(settings(folder, tmp_path / "ray" / "out", engine="ray"))
        assert shards_of(tmp_path / "ray" / "out") == shards_of(tmp_path / "local" / "out")
        first, second = (json.loads((tmp_path / one / "out" / "manifest.json").read_text()) for one in ("local", "ray"))
        assert first == second
    finally:
        ray.shutdown()

"""Processes that do not find each other, or are not of one kind, are told in a sentence."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from pydantic import Field

from ssl_pipeline import distributed
from ssl_pipeline.config import Config, ConfigError, RunError
from ssl_pipeline.training import meeting
from ssl_pipeline.training.meeting import (
    require_one_version,
    require_same,
    require_same_settings,
    version,
    wait_for_the_first,
)
from tests.ranks import run_on_ranks


def of_rank(rank: int, port: int, host: str = "127.0.0.1") -> dict[str, str]:
    return {"WORLD_SIZE": "4", "RANK": str(rank), "MASTER_ADDR": host, "MASTER_PORT": str(port)}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_first_process_that_does_not_answer_is_named(free_port, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_BETWEEN_TRIES", 0.05)
    with pytest.raises(
        ConfigError, match=f"does not answer at 127.0.0.1:{free_port} for 0.2 s .*refused.*Is it running"
    ):
        wait_for_the_first(of_rank(1, free_port), seconds=0.2)


def test_an_unknown_host_is_named_at_once(monkeypatch):
    def no_such_name(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_such_name)
    with pytest.raises(ConfigError, match="MASTER_ADDR=node17 is not a host name that this node knows"):
        wait_for_the_first(of_rank(3, 29500, "node17"))


def test_the_others_wait_for_a_first_process_that_is_late(free_port, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_BETWEEN_TRIES", 0.02)
    server = socket.socket()

    def answer() -> None:
        time.sleep(0.2)
        server.bind(("127.0.0.1", free_port))
        server.listen()

    thread = threading.Thread(target=answer)
    thread.start()
    wait_for_the_first(of_rank(1, free_port), seconds=20)
    thread.join()
    server.close()


def test_the_first_process_waits_for_nobody():
    wait_for_the_first({"WORLD_SIZE": "4", "RANK": "0"})
    wait_for_the_first({"RANK": "3"})  # left over in a shell


def told() -> str:
    if distributed.rank() == 1:
        meeting.version = lambda: "ssl-pipeline 0.1 (12345678), torch 2.6"
    try:
        require_one_version(torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_a_node_with_another_version_is_named_on_all_ranks():
    sentences = run_on_ranks(told)
    assert sentences == 2 * [
        "All processes must run the same code. Rank 1 has ssl-pipeline 0.1 (12345678), torch 2.6, rank 0 has "
        f"{version()} (1 of 2 processes differ). Install the same version on all nodes."
    ]


def same() -> str:
    require_one_version(torch.device("cpu"))
    return version()


def test_processes_of_one_version_go_on():
    first, second = run_on_ranks(same)
    assert first == second
    assert len(first) <= meeting.LONGEST_VERSION


class Settings(Config):
    """Some of a run's."""

    lr: float = 0.1
    steps: int = 3
    data: dict[str, str | int] = Field(default_factory=dict)


def differing(*all_ranks: Settings) -> str:
    return raised(lambda: require_same_settings(all_ranks[distributed.rank()], torch.device("cpu")))


def raised(check: Callable[[], None]) -> str:
    try:
        check()
    except (ConfigError, RunError) as error:
        return str(error)
    return "nothing"


def test_a_node_with_other_settings_is_named_on_all_ranks():
    sentence = (
        "All processes must have the same settings. lr is 0.5 on rank 1 and 0.1 on rank 0 (2 settings differ). "
        "Start all nodes with the same command."
    )
    others = [Settings(), Settings(lr=0.5, steps=4)]
    assert run_on_ranks(differing, *others) == [f"On rank 1: {sentence}", sentence]


def test_a_node_may_have_its_own_places_and_workers():
    own = [Settings(data={"shards": f"/local{rank}/x", "workers": rank, "cache_dir": str(rank)}) for rank in range(2)]
    assert run_on_ranks(differing, *own) == ["nothing", "nothing"]


def test_a_key_that_one_node_lacks_is_named():
    first, second = run_on_ranks(differing, Settings(data={"a": 1}), Settings())
    assert "data.a is null on rank 1 and 1 on rank 0." in first
    assert first.endswith(second)


def other_images() -> str:
    rank = distributed.rank()
    return raised(lambda: require_same("images", f"/local{rank}/x", f"{rank}2345678abc", torch.device("cpu")))


def test_a_node_with_other_images_is_named_on_all_ranks():
    first, second = run_on_ranks(other_images)
    assert "Those of /local1/x on rank 1 have the fingerprint 12345678, on rank 0 it is 02345678." in second
    assert first == f"On rank 1: {second}"


def test_another_file_is_another_version(tmp_path):
    (tmp_path / "a.py").write_text("one = 1\n")
    before = meeting._digest_of(tmp_path)
    meeting._digest_of.cache_clear()
    (tmp_path / "a.py").write_text("one = 2\n")
    assert meeting._digest_of(tmp_path) != before

"""Two torchrun agents as two nodes on the loopback: one is lost, the other goes on, each image once per epoch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from ssl_pipeline.run.processes import parent_of
from tests.runs import rows, status, wait_until, write_recipe
from tests.tiny import write_shards

ROOT = Path(__file__).parents[2]
NUM_IMAGES, EPOCHS = 48, 40
pytestmark = [pytest.mark.slow, pytest.mark.ddp]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_node(port: int, record: Path, argv: list[str], printed: Path, *, host: bool) -> subprocess.Popen:
    """An agent with two trainers that meets the others at the port, and goes on with as many as there are.

    host: whether it is the node that the others meet at, which must not be lost.
    """
    agent = ["--nnodes=1:2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    agent += [
        "--rdzv-id=nodes",
        f"--rdzv-conf=is_host={int(host)},last_call_timeout=5",
        "--max-restarts=3",
        "--local-addr=127.0.0.1",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *agent,
        "-m",
        "tests.commands.recorded",
        str(record),
        *argv,
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with printed.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def tree_of(pid: int) -> set[int]:
    """A process and all below it."""
    parents = {int(folder.name): parent_of(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    below = {pid}
    while more := {one for one, parent in parents.items() if parent in below} - below:
        below |= more
    return below


def lose(node: subprocess.Popen) -> None:
    """As by a power cut: agent and trainers at once."""
    for pid in tree_of(node.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def images_of(record: Path, processes: int) -> list[list[list[int]]]:
    """The images of each micro-batch, by rank."""
    files = [Path(f"{record}-of-{processes}.{rank}") for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_after_a_lost_node_the_others_go_on_and_each_image_comes_once_per_epoch(tmp_path):
    shards = write_shards(tmp_path / "shards", (20, 17, 11))
    train = {"epochs": EPOCHS, "save_every": 5, "log_every": 1, "hang_timeout": 0}
    recipe = write_recipe(tmp_path / "tiny.yaml", "dino", shards, train=train)
    output, record = tmp_path / "run", tmp_path / "images"
    argv = [f"recipe={recipe}", f"output={output}", "data.batch_size=3"]
    port, printed = free_port(), [tmp_path / "first", tmp_path / "second"]
    nodes = [start_node(port, record, argv, file, host=file == printed[0]) for file in printed]
    try:
        wait_until(lambda: len(rows(output)) >= 12, timeout=240)
        lose(nodes[1])
        assert nodes[0].wait(timeout=300) == 0, printed[0].read_text()
    finally:
        for node in nodes:
            if node.poll() is None:
                lose(node)
    assert status(output)["state"] == "done"
    assert rows(output)[-1]["images"] >= EPOCHS * NUM_IMAGES
    together, alone = images_of(record, 4), images_of(record, 2)
    assert all(len(of_rank) >= 12 for of_rank in together)
    went_on_after = (EPOCHS * NUM_IMAGES - sum(len(batch) for batch in alone[0]) * 2) // 12
    assert went_on_after % 5 == 0, "from a checkpoint"
    kept = [batch for of_rank in together for batch in of_rank[:went_on_after]]
    seen = Counter(image for batch in [*kept, *alone[0], *alone[1]] for image in batch)
    assert set(seen) == set(range(NUM_IMAGES))
    assert set(seen.values()) == {EPOCHS}

"""The examples in docs/clusters do what docs/clusters.md says, as far as that can be seen without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "docs" / "clusters"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >> "$TOLD"; fi
"""
SRUN = """#!/bin/bash
echo "$@" >> "$TOLD"
trap 'echo asked >> "$TOLD"; exit 143' TERM
if [ -n "$STATE" ]; then mkdir -p "$RUN"; echo "$STATE" > "$RUN/status.json"; fi
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE"
"""


def submit(tmp_path: Path, *, state: str = "", code: int = 0, tenths: int = 0, settings: str = "") -> subprocess.Popen:
    """The batch script with stand-ins for SLURM's commands, which write what they are told into a file."""
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "RUN": str(tmp_path / "run"),
        "STATE": json.dumps({"state": state}) if state else "",
        "CODE": str(code),
        "TENTHS": str(tenths),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    command = ["bash", str(FOLDER / "pretrain.sbatch"), "recipe=x", settings or f"output={tmp_path / 'run'}"]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def told(tmp_path: Path) -> str:
    return (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""


def test_a_job_that_is_done_ends(tmp_path):
    assert submit(tmp_path, state="done").wait() == 0
    assert "requeue" not in told(tmp_path)
    assert "--rdzv-endpoint=node1:29500" in told(tmp_path)
    assert f"pretrain.py recipe=x output={tmp_path / 'run'}" in told(tmp_path)


def test_a_job_that_failed_goes_back_into_the_queue(tmp_path):
    submit(tmp_path, state="running", code=1).wait()
    assert told(tmp_path).endswith("requeue 17\n")


def test_settings_that_are_refused_are_not_tried_again(tmp_path):
    assert submit(tmp_path, code=2).wait() == 2
    assert "requeue" not in told(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_job_whose_time_is_over_saves_and_goes_back_into_the_queue(tmp_path, number):
    job = submit(tmp_path, state="preempted", tenths=300)
    end = time.monotonic() + 30
    while not (tmp_path / "run" / "status.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(number)
    job.wait(timeout=30)
    assert told(tmp_path).splitlines()[-2:] == ["asked", "requeue 17"]


def test_an_output_is_needed(tmp_path):
    assert submit(tmp_path, settings="seed=1").wait() == 2
    assert told(tmp_path) == ""


def test_the_kubernetes_example_is_one_job_whose_pods_know_each_other():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (
        f"--rdzv-endpoint=pretrain-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" in arguments
    )
    assert arguments[arguments.index("-m") + 1] == "ssl_pipeline.commands.start"

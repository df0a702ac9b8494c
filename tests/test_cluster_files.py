"""The examples in docs/clusters do what docs/clusters.md says, as far as that can be seen without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.runs import rows, status, wait_until, write_recipe
from tests.tiny import write_shards

FOLDER = Path(__file__).parents[1] / "docs" / "clusters"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nnode2\\n'; else echo "$@" >> "$TOLD"; fi
"""
SRUN = """#!/bin/bash
echo "$@" >> "$TOLD"
shift  # its own option
if [ -n "$TASK" ]; then set -- "$TASK" "$@"; fi
"$@" &
echo $! > "$TASKS"
trap 'kill -KILL $(cat "$TASKS"); exit 137' TERM  # as the real one ends its tasks
while true; do  # a signal ends a wait, not the task
    wait $(cat "$TASKS"); code=$?
    kill -0 $(cat "$TASKS") 2>/dev/null || break
done
exit $code
"""
SCANCEL = """#!/bin/bash
echo "$@" >> "$TOLD"
kill -TERM $(cat "$TASKS")
"""
TASK = """#!/bin/bash
trap 'echo asked >> "$TOLD"; exit 143' TERM
mkdir -p "$RUN/checkpoints"
if [ -n "$STATE" ]; then echo "$STATE" > "$RUN/status.json"; fi
if [ -n "$CHECKPOINT" ]; then mkdir "$RUN/checkpoints/$CHECKPOINT"; fi
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE"
"""
SETTINGS = """#!/bin/bash
echo "read $@" >> "$TOLD"
exit "$REFUSED"
"""


def submit(
    tmp_path: Path,
    *settings: str,
    state: str = "",
    code: int = 0,
    tenths: int = 0,
    refused: int = 0,
    checkpoint: str = "",
    real: bool = False,
) -> subprocess.Popen:
    """The batch script with stand-ins for SLURM's commands, which write what they are told into a file.

    real: whether python and torchrun are the real ones.
    """
    scripts = {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL}
    if not real:
        scripts |= {"python": SETTINGS, "task": TASK}
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "TASKS": str(tmp_path / "tasks"),
        "TASK": "" if real else str(tmp_path / "task"),
        "RUN": str(tmp_path / "run"),
        "STATE": json.dumps({"state": state}) if state else "",
        "CODE": str(code),
        "REFUSED": str(refused),
        "CHECKPOINT": checkpoint,
        "TENTHS": str(tenths),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "1" if real else "2",
        "SLURM_GPUS_ON_NODE": "2" if real else "8",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(FOLDER / "pretrain.sbatch"), *(settings or ("recipe=x", f"output={tmp_path / 'run'}"))]
    return subprocess.Popen(command, env=environment, cwd=FOLDER.parents[1], start_new_session=True)


def told(tmp_path: Path) -> str:
    return (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""


def test_a_job_that_is_done_ends(tmp_path):
    assert submit(tmp_path, state="done").wait() == 0
    assert "requeue" not in told(tmp_path)
    assert "--rdzv-endpoint=localhost:29500" in told(tmp_path)
    assert f"pretrain.py recipe=x output={tmp_path / 'run'}" in told(tmp_path)


def test_a_job_that_failed_goes_back_into_the_queue(tmp_path):
    submit(tmp_path, state="running", code=1).wait()
    assert told(tmp_path).endswith("requeue 17\n")


def test_a_job_that_fails_three_times_in_a_row_without_a_new_checkpoint_is_given_up(tmp_path):
    assert [submit(tmp_path, state="failed", code=1).wait() for _ in range(3)] == [0, 0, 1]
    assert told(tmp_path).count("requeue 17") == 2
    again = [submit(tmp_path, code=1, checkpoint=f"step-{number}").wait() for number in range(4)]
    assert again == [0, 0, 0, 0]


def test_a_state_that_an_earlier_start_has_left_is_not_taken_for_this_one(tmp_path):
    submit(tmp_path, state="done", code=1).wait()
    assert told(tmp_path).endswith("requeue 17\n")


def test_settings_that_are_refused_are_not_tried(tmp_path):
    assert submit(tmp_path, refused=2).wait() == 2
    assert told(tmp_path) == f"read pretrain.py recipe=x output={tmp_path / 'run'} --print\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_job_whose_time_is_over_saves_and_goes_back_into_the_queue(tmp_path, number):
    job = submit(tmp_path, state="preempted", tenths=300)
    wait_until(lambda: (tmp_path / "run" / "status.json").exists())
    job.send_signal(number)
    job.wait(timeout=30)
    assert told(tmp_path).splitlines()[-3:] == ["--signal=TERM 17.0", "asked", "requeue 17"]


@pytest.mark.slow
@pytest.mark.ddp
def test_a_real_torchrun_saves_before_the_end_of_the_time(tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", "dino", write_shards(tmp_path / "shards", (20, 17, 11)))
    output = tmp_path / "run"
    length = ["train.epochs=10000", "train.save_every=1ep", "data.batch_size=3"]
    settings = [f"recipe={recipe}", f"output={output}", *length]
    job = submit(tmp_path, *settings, real=True)
    wait_until(lambda: (output / "metrics.jsonl").exists() and bool(rows(output)), timeout=120)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    assert told(tmp_path).splitlines()[-2:] == ["--signal=TERM 17.0", "requeue 17"]
    assert status(output)["state"] == "preempted"
    assert status(output)["step"] == rows(output)[-1]["step"]


def test_an_output_is_needed(tmp_path):
    assert submit(tmp_path, "seed=1").wait() == 2
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
    (first,) = pod["initContainers"]
    assert [*arguments[arguments.index("ssl_pipeline.commands.start") :], "--print"] == first["args"][1:]
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == first["name"]

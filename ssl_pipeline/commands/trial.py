"""A trial before a run: a few of its steps in a separate process, to estimate how long all of it will take."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median

import yaml

from ssl_pipeline.commands.process import start_pretraining
from ssl_pipeline.config import RECIPES, Config, Tree, Value, dump, load, read_yaml
from ssl_pipeline.config.arguments import assign
from ssl_pipeline.config.yaml_text import YamlDumper

STEPS, SECONDS = 20, 30.0
SECONDS_BETWEEN_LOOKS = 0.2
SHORT: Tree = {  # the trial's own settings
    "recipe": None,
    "output": None,
    "images": None,
    "wandb": False,
    "find_lr": False,
    "report": False,
    "knn": None,
    "spectrum": None,
    "classifier": None,
    "train.epochs": None,
    "train.steps": STEPS,
    "train.save_every": "100%",
    "train.log_every": 1,
}
LONGEST_OF_UNIT = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (172_800.0, 3600.0, "h"), (float("inf"), 86_400.0, "days"))


def expected_time(
    schema: type[Config],
    arguments: Sequence[str],
    overrides: Mapping[str, Value],
    *,
    num_images: int,
    num_processes: int = 1,
) -> str:
    """What a trial of the run with these arguments says: its expected time, or that it is unknown.

    At most STEPS steps, and SECONDS with the start of the process. overrides: values by dotted keys, over the
    arguments. Monitors and checkpoints are left out of it. One process is timed, on the first GPU; with `num_processes`
    the work is divided by their number, without what they lose by waiting for each other. Raises ConfigError for
    settings that no run can have.
    """
    with redirect_stderr(io.StringIO()):  # the notes of this reading appear when the run reads them
        settings = dump(load(schema, arguments, recipes=RECIPES, overrides=overrides))
    tree = read_yaml(settings, where="the settings")
    assert isinstance(tree, dict)
    train = tree["train"]
    assert isinstance(train, dict)
    epochs, steps = train["epochs"], train["steps"]
    for key, value in SHORT.items():
        assign(tree, tuple(key.split(".")), value)
    print(f"Timing up to {STEPS} steps, {SECONDS:.0f} s at most ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="ssl_pipeline-trial-") as place:
        recipe, run = Path(place) / "trial.yaml", Path(place) / "run"
        recipe.write_text(yaml.dump(tree, Dumper=YamlDumper, sort_keys=False), encoding="utf-8")
        failure = _run([f"recipe={recipe}", f"output={run}"])
        rows = _rows(run / "metrics.jsonl")[1:]  # the first step prepares what the others find ready
    if failure:
        return f"No time estimate: a trial of {STEPS} steps failed ({failure.rstrip('.')})"
    if not rows:
        return f"No step was timed in {SECONDS:.0f} s, so there is no time estimate"
    per_second, global_batch = median(row["images_per_second"] for row in rows), rows[0]["images"] / rows[0]["step"]
    images = (
        epochs * num_images if isinstance(epochs, int | float) else float(str(steps)) * global_batch * num_processes
    )
    each = "" if num_processes == 1 else f" in each of {num_processes} processes, if none waits for another"
    return f"Expected time: {duration(images / (per_second * num_processes))} ({per_second:.3g} images/s{each})"


def duration(seconds: float) -> str:
    """Two digits in the unit that reads best."""
    unit, name = next((unit, name) for longest, unit, name in LONGEST_OF_UNIT if seconds < longest)
    return f"{seconds / unit:.2g} {name}" if seconds / unit < 99.5 else f"{seconds / unit:.0f} {name}"


def _run(arguments: Sequence[str]) -> str:
    """The run, until its end or until the time is up; what it says of an error, if it ends with one."""
    with tempfile.TemporaryFile() as printed:
        process = start_pretraining(arguments, output=printed)
        until = time.monotonic() + SECONDS
        try:
            while (code := process.poll()) is None and time.monotonic() < until:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            process.kill()
            process.wait()
        if not code:
            return ""
        printed.seek(0)
        return error_in(printed.read().decode(errors="replace")) or f"exit code {code}"


def error_in(printed: str) -> str:
    """The line in which a command says why it ends, without the word before it; "" where there is none."""
    told = [line for line in printed.splitlines() if line.startswith("error: ")]
    return told[-1].removeprefix("error: ") if told else ""


def _rows(path: Path) -> list[dict[str, float]]:
    """The rows of a log whose last line may be cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]

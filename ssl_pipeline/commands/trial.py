"""A trial before a run: a few steps of it in a process of their own, to say how long the whole will take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import yaml

from ssl_pipeline.config import RECIPES, Tree, Value, read_recipe
from ssl_pipeline.config.arguments import assign, keys_of
from ssl_pipeline.config.yaml_text import YamlDumper
from ssl_pipeline.run.launcher import LAUNCHED

START = "ssl_pipeline.commands.start"  # which imports this module in the end
STEPS, SECONDS = 20, 30.0
SECONDS_BETWEEN_LOOKS = 0.2
SHORT: Tree = {  # what a trial has of its own
    **{"images": None, "wandb": False, "knn": None, "spectrum": None, "classifier": None},
    **{"train.epochs": None, "train.steps": STEPS, "train.save_every": "100%", "train.log_every": 1},
}
LONGEST_OF_UNIT = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (172_800.0, 3600.0, "h"), (float("inf"), 86_400.0, "days"))


def expected_time(arguments: Sequence[str], overrides: Mapping[str, Value], *, num_images: int) -> str:
    """What a trial of the run with these arguments says: its expected time, or that there is none to tell.

    At most STEPS steps, and SECONDS with the start of the process. overrides: values by dotted keys, over the
    arguments. Monitors and checkpoints are left out of it.
    """
    with tempfile.TemporaryDirectory(prefix="ssl_pipeline-trial-") as place:
        recipe, run = Path(place) / "trial.yaml", Path(place) / "run"
        given = keys_of(arguments)
        tree = read_recipe(given["recipe"], RECIPES)
        for key, value in overrides.items():
            assign(tree, tuple(key.split(".")), value)
        length = {key: given.get(f"train.{key}", _section(tree, "train").get(key)) for key in ("epochs", "steps")}
        for key, value in SHORT.items():
            assign(tree, tuple(key.split(".")), value)
        recipe.write_text(yaml.dump(tree, Dumper=YamlDumper, sort_keys=False), encoding="utf-8")
        _run([f"recipe={recipe}", f"output={run}", *_without_what_a_trial_sets(arguments)])
        rows = _rows(run / "metrics.jsonl")[1:]  # the first step prepares what the others find ready
    if not rows:
        return f"No step was timed in {SECONDS:.0f} s, so no time can be told"
    per_second = median(row["images_per_second"] for row in rows)
    images = _images(length, num_images, rows[0]["position"] / rows[0]["step"])
    return "" if images is None else f"Expected time: {duration(images / per_second)} ({per_second:.3g} images/s)"


def duration(seconds: float) -> str:
    """Two digits in the unit that reads best."""
    unit, name = next((unit, name) for longest, unit, name in LONGEST_OF_UNIT if seconds < longest)
    return f"{seconds / unit:.2g} {name}" if seconds / unit < 99.5 else f"{seconds / unit:.0f} {name}"


def _run(arguments: Sequence[str]) -> None:
    """The run, until its end or until the time is up; what it prints is for nobody."""
    command = [sys.executable, "-m", START, *arguments]
    environment, nobody = os.environ | {LAUNCHED: "1"}, subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=nobody, stderr=nobody)
    until = time.monotonic() + SECONDS
    try:
        while process.poll() is None and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        process.kill()
        process.wait()


def _without_what_a_trial_sets(arguments: Sequence[str]) -> list[str]:
    """The arguments, less those that the trial's recipe replaces and the sections that it leaves out."""
    own = {"recipe", "output", *SHORT}
    keys = [argument.partition("=")[0] for argument in arguments]
    kept = [key not in own and key.partition(".")[0] not in SHORT for key in keys]
    return [argument for argument, is_kept in zip(arguments, kept, strict=True) if is_kept]


def _rows(path: Path) -> list[dict[str, float]]:
    """The rows of a log whose last line may be cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _images(length: Mapping[str, Value], num_images: int, global_batch: float) -> float | None:
    """How many images the whole run takes; None for a length that is no number, which the run itself refuses."""
    try:
        if length["epochs"] not in (None, "null"):
            return float(str(length["epochs"])) * num_images
        return float(str(length["steps"])) * global_batch
    except ValueError:
        return None


def _section(tree: Tree, name: str) -> Tree:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}

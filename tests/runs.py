"""`pretrain.py` as a function of a process, with something that happens to it on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from unittest import mock

import torch
import yaml
from torch import Tensor

from ssl_pipeline.augment.operations.base import Channels
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import BackboneConfig, Preprocessing
from ssl_pipeline.batch import Batch
from ssl_pipeline.commands import pretrain
from ssl_pipeline.config import RECIPES, Tree, run_command, validate
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, StreamBatch
from ssl_pipeline.distributed import rank
from ssl_pipeline.methods import build_method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.training import loop, step
from ssl_pipeline.training.launch import start_accelerator
from ssl_pipeline.training.run import Monitor, Output, Run, TrainConfig, start_clock
from tests.tiny import CONFIGS, OTHER_NETWORK, VIT, make_method, needs, tiny_settings, view_shape

SGD = {"name": "sgd", "lr": {"value": 0.02, "warmup": 2, "final": 0.0}, "weight_decay": 0.01, "momentum": 0.9}
ADAMW = {"name": "adamw", "lr": {"value": 1e-3, "warmup": 2}, "weight_decay": 0.1}


@dataclass(frozen=True)
class Happening:
    """What happens just before the forward pass of micro-batch number `at` (from 0) of this process.

    what: nothing, a signal name, "kill a worker", "hang", "no memory" or "nan".
    on_rank: only there.
    record: files (suffix: the rank) that get the sample ids of each micro-batch; record_labelled: of its labelled one.
    slow_save: a file that appears when a checkpoint is half written; the process then waits to be killed.
    float64: everything behind the augmentation is computed in double precision.
    """

    what: str = ""
    at: int = 0
    on_rank: int | None = None
    record: Path | None = None
    record_labelled: Path | None = None
    slow_save: Path | None = None
    float64: bool = False


def tiny_views(name: str) -> dict[str, ViewGroup]:
    """The groups of views that a method needs, in their smallest form."""
    groups = {}
    for views in needs(name):
        count, size = view_shape(views)
        own = {} if views.for_backbone else {"mean": OTHER_NETWORK, "std": OTHER_NETWORK}
        groups[views.name] = ViewGroup(count=count, size=size, crops_of=views.crops_of, **own)
    return groups


def write_recipe(path: Path, name: str, shards: Path, **sections: object) -> Path:
    """A complete recipe for the method `name` in its smallest form; `sections` replace its sections."""
    tree: dict[str, object] = {
        "method": CONFIGS[name](**tiny_settings(name)).model_dump(mode="json", exclude_unset=True),
        "backbone": VIT.model_dump(mode="json", include={"name", "arguments"}),
        "augment": {
            group: view.model_dump(mode="json", exclude_unset=True) for group, view in tiny_views(name).items()
        },
        "data": _data(name, shards, batch_size=8),
        "optim": ADAMW,
        "train": {"steps": 12, "save_every": 4, "log_every": 1, "hang_timeout": 0, "check_ranks": 1},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def command(argv: list[str], happening: Happening | None = None) -> None:
    """`python pretrain.py ARGV`; leaves with its exit code."""
    with happens(happening or Happening()):
        sys.exit(_pretrain(argv))


def trained(argv: list[str], happening: Happening | None = None) -> dict[str, Tensor]:
    """The state of the method on this rank after a run to its end."""
    runs: list[Run] = []

    def train(run: Run) -> int:
        runs.append(run)
        if happening is not None and happening.float64:
            run.method.double()  # also what it took in by then, such as the weights of another network
        return loop.train(run)

    with happens(happening or Happening()), mock.patch.object(pretrain, "train", train):
        assert _pretrain(argv) == 0
    return {name: tensor.clone() for name, tensor in runs[0].method.state_dict().items()}


def _pretrain(argv: list[str]) -> int:
    return run_command(
        pretrain.PretrainConfig, pretrain.pretrain, command="pretrain.py", argv=argv, recipes=RECIPES, shared=True
    )


def needs_labels(name: str) -> bool:
    return bool(any(views.labelled for views in needs(name)))


def _data(name: str, shards: Path, *, batch_size: int) -> Tree:
    data: Tree = {"shards": str(shards), "batch_size": batch_size, "workers": 0}
    return data | ({"labelled": {"shards": str(shards), "batch_size": batch_size // 2}} if needs_labels(name) else {})


def make_run(
    output: Path,
    name: str,
    shards: Path,
    *,
    backbone: BackboneConfig = VIT,
    batch_size: int = 8,
    cache: bool = False,
    optim: Mapping[str, object] = SGD,
    monitors: Sequence[Monitor] = (),
    directory: RunDirectory | None = None,
    seed: int = 0,
    **train: object,
) -> Run:
    """What `pretrain.py` gives the engine, for the method `name` in its smallest form."""
    output.mkdir(parents=True, exist_ok=True)
    data = validate(DataConfig, _data(name, shards, batch_size=batch_size) | {"cache": cache})
    config = validate(TrainConfig, {"steps": 12, "save_every": 4, "log_every": 1, "hang_timeout": 0} | train)
    accelerator, index = start_accelerator(config), open_shards(shards)
    return Run(
        method=make_method(name, backbone=backbone, seed=seed),
        preprocessing=Preprocessing(16, data.mean, data.std),
        clock=start_clock(index, data, config),
        index=index,
        labelled_index=open_shards(data.labelled.shards) if data.labelled is not None else None,
        augment=tiny_views(name),
        data=data,
        optim=validate(OptimConfig, dict(optim)),
        train=config,
        seed=seed,
        accelerator=accelerator,
        output=Output(output, directory),
        monitors=monitors,
    )


def losses(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of each row of metrics.jsonl, as they are written there."""
    return [(entry["step"], entry["loss"]) for entry in rows(output)]


def rows(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(output: Path) -> dict[str, object]:
    return json.loads((output / "status.json").read_text())


def final_state(output: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint: the tensors of method and optimizer."""
    saved = Checkpoints(output / "checkpoints").load_latest()
    assert saved is not None
    return {f"{file}/{name}": tensor for file, tensors in saved.tensors.items() for name, tensor in tensors.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_until(condition: Callable[[], bool], *, timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.005)


@contextmanager
def happens(happening: Happening) -> Iterator[None]:
    """Let it happen in the runs of this block."""
    made = count()
    original = step.make_batch

    def make_batch(images: StreamBatch, augment: Mapping[str, ViewGroup], **normalisation: Channels) -> Batch:
        batch = original(images, augment, **normalisation)
        for record, seen in ((happening.record, batch), (happening.record_labelled, batch.labelled)):
            if record is not None and seen is not None:
                with record.with_suffix(f".{rank()}").open("a") as file:
                    file.write(json.dumps(seen.sample_ids.tolist()) + "\n")
        if happening.float64:
            batch = _double(batch)
        if next(made) == happening.at and happening.on_rank in (None, rank()):
            shown = batch.views if batch.views or batch.labelled is None else batch.labelled.views
            _happen(happening.what, next(iter(shown.values())))
        return batch

    def write_manifest(directory: Path, state: object, files: object) -> None:
        assert happening.slow_save is not None
        happening.slow_save.touch()
        time.sleep(60)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(step, "make_batch", make_batch))
        if happening.float64:
            stack.enter_context(mock.patch.object(pretrain, "build_method", lambda *a: build_method(*a).double()))
        if happening.slow_save is not None:
            stack.enter_context(mock.patch("ssl_pipeline.run.checkpoints.write_manifest", write_manifest))
        yield


def _double(batch: Batch) -> Batch:
    views = {name: tensor.double() for name, tensor in batch.views.items()}
    return replace(batch, views=views, labelled=_double(batch.labelled) if batch.labelled is not None else None)


def _happen(what: str, views: Tensor) -> None:
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "kill a worker":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    elif what == "hang":
        time.sleep(60)
    elif what == "no memory":
        raise MemoryError
    elif what == "nan":
        views[0, 0] = torch.nan

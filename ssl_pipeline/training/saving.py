"""Which parts of a run go into its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Preprocessing, save_backbone, save_classifier
from ssl_pipeline.distributed import rank
from ssl_pipeline.methods.base import Method
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.optimizer_state import optimizer_tensors
from ssl_pipeline.run.state import LoggedRow, RunState, SavedBackbone, SavedClassifier
from ssl_pipeline.sharded import is_sharded, local
from ssl_pipeline.training.run import Run, learnt_images

NO_FIGURES: Mapping[str, float] = MappingProxyType({})


def save_run(
    run: Run,
    checkpoints: Checkpoints,
    optimizer: torch.optim.Optimizer,
    *,
    position: int,
    identity: Mapping[str, str],
    row: LoggedRow | None = None,
    start: Mapping[str, float] = NO_FIGURES,
    left_out_steps: int = 0,
) -> None:
    """Write a checkpoint of a run that has seen `position` images; all processes call it.

    Rank 0 writes, or each its share of a method that is sharded. row, start, left_out_steps: of `RunState`.
    """
    state = run_state(run, position=position, identity=identity)
    state = replace(state, row=_without_nan(row), start=dict(start), left_out_steps=left_out_steps)
    tensors = {"method": run.method.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    if run.sharding is not None:
        parts = {name: _own_part(of) for name, of in tensors.items()}
        checkpoints.save_parts(state, parts, device=run.accelerator.device)
    elif run.output.directory is not None:
        checkpoints.save(state, tensors)
    run.accelerator.wait_for_everyone()


def _own_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows of what is sharded, and on the first process everything else."""
    return {name: local(tensor) for name, tensor in tensors.items() if is_sharded(tensor) or rank() == 0}


def export_run(run: Run, folder: Path, *, position: int) -> None:
    """Write the evaluated backbone and what else the method has to export, as they are at `position`.

    All processes call it, rank 0 writes.
    """
    backbone, classifier = run.whole_backbone(), run.whole_classifier()
    if run.output.directory is None:
        return
    if classifier is not None:
        save_classifier(folder, classifier, _class_names(run))
    run.method.export(folder)
    save_backbone(folder, backbone, run.preprocessing, step=run.clock.steps_made(position))


def _class_names(run: Run) -> tuple[str, ...] | None:
    learnt = learnt_images(run.method, run.index, run.labelled_index)
    return None if learnt is None or learnt.class_names is None else tuple(learnt.class_names)


def _without_nan(row: LoggedRow | None) -> LoggedRow | None:
    if row is None:
        return None
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def run_state(run: Run, *, position: int, identity: Mapping[str, str]) -> RunState:
    """Where the run is at `position`, and what is in its method file."""
    scaler = run.accelerator.scaler
    return RunState(
        position=position,
        global_batch=run.clock.global_batch,
        identity=dict(identity),
        backbones=saved_backbones(run.method, run.preprocessing),
        classifier=saved_classifier(run.method, _class_names(run)),
        settings=run.output.plain_settings(),
        scaler=scaler.state_dict() if scaler is not None else None,
        steps=run.clock.steps_made(position),
        labelled_position=run.clock.labelled_position(position) if run.labelled_index is not None else None,
    )


def saved_backbones(method: Method, preprocessing: Preprocessing) -> dict[str, SavedBackbone]:
    """Where the tensors of each backbone are in the method's state dict, and what it needs."""
    return {
        name: SavedBackbone(
            prefix=_prefix_of(backbone, method),
            config=backbone.config.model_dump(mode="json"),
            size=preprocessing.size,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
        for name, backbone in method.backbones().items()
    }


def saved_classifier(method: Method, class_names: tuple[str, ...] | None) -> SavedClassifier | None:
    """The same of the method's classifier, None if it has none."""
    if method.classifier is None:
        return None
    return SavedClassifier(_prefix_of(method.classifier, method), method.classifier.out_features, class_names)


def _prefix_of(part: nn.Module, method: nn.Module) -> str:
    return next(f"{name}." for name, module in method.named_modules() if module is part)

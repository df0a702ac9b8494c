"""Pretrain a backbone: `accelerate launch pretrain.py recipe=NAME [key=value ...]`.

The composition root: it combines training and evaluation, which do not import each other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import model_validator

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import (
    Backbone,
    BackboneConfig,
    Preprocessing,
    create_backbone,
)
from ssl_pipeline.backbones.exported import about_weights
from ssl_pipeline.commands.afterwards import in_python, measuring, of_the_run
from ssl_pipeline.commands.before_packing import check_outline
from ssl_pipeline.commands.colours import fit_colours
from ssl_pipeline.commands.find_lr import find_lr
from ssl_pipeline.commands.images import expand
from ssl_pipeline.commands.monitors import open_monitors
from ssl_pipeline.commands.pages_on_the_way import PagesOnTheWay
from ssl_pipeline.config import (
    RECIPES,
    Config,
    MayChange,
    PlaceText,
    Seed,
    Tree,
    printable,
    refuse,
    run_command,
    some_of,
    without_flags,
)
from ssl_pipeline.data.labelled import classes_without_labels, open_labelled_images
from ssl_pipeline.data.shards.listing import shards_may_be_at
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.data.stream import DataConfig, open_images
from ssl_pipeline.eval.knn import KnnMonitorConfig
from ssl_pipeline.eval.monitors import ClassifierMonitorConfig, SpectrumMonitorConfig
from ssl_pipeline.files import JSON
from ssl_pipeline.methods import MethodConfig, build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.interruption import StopAtOnce, Stopped
from ssl_pipeline.run.provenance import describe_start
from ssl_pipeline.run.watchdog import Watchdog
from ssl_pipeline.training.clock import Clock
from ssl_pipeline.training.determinism import COST, deterministic
from ssl_pipeline.training.failures import Failures
from ssl_pipeline.training.launch import describe_launch, ignored_variables, start_accelerator
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.meeting import require_same, require_same_settings
from ssl_pipeline.training.preflight import (
    check_batch_norm,
    check_labels,
    check_precision,
    check_recipe,
    evaluation_size,
    run_facts,
)
from ssl_pipeline.training.remarks import (
    about_accumulation,
    about_batch_norm,
    about_class_token,
    about_soft_labels,
    remarks,
)
from ssl_pipeline.training.resume import STARTING_WEIGHTS, check_settings, read_settings
from ssl_pipeline.training.run import Output, Run, Start, TrainConfig, learnt_images, start_clock
from ssl_pipeline.training.sharding import check_sharding


class PretrainConfig(Config):
    """Pretrain a backbone on unlabelled images with the method and settings of a recipe."""

    recipe: MayChange[str | None] = None
    """The recipe that these settings come from: a name in recipes/, or a path to a YAML file. With images it may be
    left out, or `auto`: chosen by the images and the machine."""
    images: MayChange[PlaceText | None] = None
    """Folder or zip of images, packed into OUTPUT/images at the first start, in place of data.shards; or shards."""
    output: MayChange[Path | None] = None
    """The run's directory (default: runs/RECIPE); the same command again resumes there."""
    seed: Seed = 0
    """Seed of the weights, the order of the images and the augmentation."""
    method: MethodConfig
    """What is learnt."""
    backbone: BackboneConfig
    """What is trained."""
    augment: dict[str, ViewGroup]
    """Groups of views by name; each method says which it needs."""
    data: DataConfig
    """Where the images come from."""
    optim: OptimConfig
    """The optimizer and its schedules."""
    train: TrainConfig
    """Length, precision, checkpoints."""
    knn: MayChange[KnnMonitorConfig | None] = None
    """k-NN accuracy during training; leave out for images without labels."""
    classifier: MayChange[ClassifierMonitorConfig | None] = None
    """Accuracy of the method's own classifier during training, for methods that have one."""
    spectrum: MayChange[SpectrumMonitorConfig | None] = None
    """RankMe and alpha-ReQ of the features during training: what can be measured without labels."""
    find_lr: MayChange[bool] = False
    """Whether only a learning-rate range test is made, of at most 100 steps: it writes find_lr.json and find_lr.svg
    into the run's directory, suggests optim.lr, and begins no run."""
    wandb: MayChange[bool] = False
    """Whether metrics go to Weights & Biases too (extra `wandb`)."""
    report: MayChange[bool | None] = None
    """Whether another process writes the run's page, report/index.html, at the end and after each checkpoint, at low
    priority; null: only at the end, and only with images=."""

    @model_validator(mode="after")
    def _output_is_known(self) -> PretrainConfig:
        if self.output is None and self.recipe is None:
            raise ValueError("output is missing: set output=DIR (with recipe=NAME it is runs/NAME).")
        return self

    @classmethod
    def fit_recipe(cls, tree: Tree, given: Collection[str], recipe: Tree) -> list[str]:
        """Another network: mean and std of its weights. Own images: monitors go whose labelled images are the recipe's
        and are not there."""
        notes = fit_colours(tree, given, recipe)
        typed = {".".join(key.split(".")[:depth]) for key in given for depth in (1, 2)}
        for name, paths in (("knn", ("train", "val")), ("classifier", ("val",))):
            monitor = tree.get(name)
            theirs = [f"{name}.{path}" for path in paths]
            if "data.shards" not in typed or not isinstance(monitor, dict) or name in given or typed & set(theirs):
                continue
            named = [path for path in paths if monitor.get(path) is not None]
            missing = next((path for path in named if not shards_may_be_at(monitor[path])), None)
            if missing:
                tree[name] = None
                notes.append(
                    f"{name}.{missing}={monitor[missing]} of the recipe does not exist, so this run goes on without "
                    f"{name}. Set {' and '.join(theirs)} to measure on your own labelled images."
                )
        return notes

    @property
    def run_directory(self) -> Path:
        return self.output if self.output is not None else Path("runs") / Path(str(self.recipe)).stem


def pretrain(config: PretrainConfig) -> int:
    """Run the settings to the end; returns the exit code, 128 + the signal number if one stopped it."""
    try:
        with StopAtOnce():  # until training begins, and again after it
            return _pretrain(config)
    except Stopped as stopped:
        print(f"Stopped by {stopped}, while no step was under way; run again to go on.", file=sys.stderr)
        return 128 + stopped.signal_number


def _pretrain(config: PretrainConfig) -> int:
    started = time.perf_counter()
    with ExitStack() as stack:
        directory: RunDirectory | None = None
        starting = stack.enter_context(ExitStack())
        watchdog = Watchdog(
            config.train.hang_timeout, note=lambda why: directory.fail(why) if directory else None, by_activity=True
        )
        starting.enter_context(watchdog)
        ignored = ignored_variables(os.environ, config.train)
        stack.enter_context(deterministic(config.train.deterministic))
        accelerator = start_accelerator(config.train)
        require_same_settings(config, accelerator.device)
        if ignored and accelerator.is_main_process:
            print(printable(f"Ignored, because the recipe decides: {', '.join(ignored)}"), flush=True)
        output = config.run_directory
        stack.enter_context(Failures(output, config.data, config.train, config.backbone).explained())
        backbone, method = _networks(config, accelerator.device)
        if accelerator.is_main_process and not config.find_lr:
            directory = stack.enter_context(RunDirectory(output))
            there = read_settings(PretrainConfig, output)
            if there is not None:
                check_settings(output, there, config)
            directory.refuse_lost_checkpoints()
        else:
            starting.close()  # it waits for the first rank, which may index for hours, and whose end is the end of all
        weights = _about_weights(backbone)
        images = _Images.opened(config, weights, accelerator.device)
        index, labelled_index = images.all, images.labelled
        clock = start_clock(index, config.data, config.train)  # refuses a batch larger than the data set
        check_labels(method, index, config.data)
        learnt = learnt_images(method, index, labelled_index)
        micro_batch = clock.global_batch // config.train.accumulate
        method.prepare(
            run_facts(
                index, learnt, config.augment, config.data, global_batch=clock.global_batch, micro_batch=micro_batch
            )
        )
        check_batch_norm(method, config.data, config.train, num_processes=accelerator.num_processes)
        preprocessing = Preprocessing(evaluation_size(method, config.augment), config.data.mean, config.data.std)
        wanted = (None, None, None) if config.find_lr else (config.knn, config.spectrum, config.classifier)
        monitors = open_monitors(
            *wanted,
            method=method,
            preprocessing=preprocessing,
            data=config.data,
            index=index,
            labelled_index=learnt,
            from_weights=config.backbone.weights is not None,
            device=accelerator.device,
            precision=config.train.precision,
        )
        about: dict[str, JSON] = {}
        if directory is not None:
            num_labelled = 0 if labelled_index is None else len(labelled_index)
            describe(config, method, clock, accelerator, num_labelled=num_labelled)
            if labelled_index is not None:
                warn_of_labels(method, index, labelled_index)
            about = describe_start(num_processes=accelerator.num_processes)
            about |= {"data": _about(index), "labelled data": _about(labelled_index)}
            about["weights"] = weights
        starting.close()
        wants_page = config.images is not None if config.report is None else config.report
        pages = PagesOnTheWay(output) if wants_page and directory is not None else None
        if pages is not None:
            stack.callback(pages.stop)
        on_the_way = pages if pages is not None and config.report else lambda: None
        run = Run(
            method=method,
            preprocessing=preprocessing,
            clock=clock,
            index=index,
            labelled_index=labelled_index,
            augment=config.augment,
            data=config.data,
            optim=config.optim,
            train=config.train,
            seed=config.seed,
            accelerator=accelerator,
            output=Output(output, directory, config, images.identity, config.wandb, about, saved=on_the_way),
            monitors=monitors,
            start=Start(started, images.seconds),
        )
        signal_number, before = 0, read_status(output)
        if config.find_lr:
            find_lr(run)
        else:
            signal_number = train(run)
        if signal_number == 0 and directory is not None:
            page = pages.finish(is_new=read_status(output) != before) if pages is not None else None
            own = config.data.shards if isinstance(config.data.shards, str) else None
            print(f"Done. {measuring(output, own)}\n{of_the_run(output, own, page)}\n{in_python(output, own)}")
        accelerator.wait_for_everyone()  # whoever leaves first takes the group from those who still write
        accelerator.end_training()
    return 128 + signal_number if signal_number else 0


def _networks(config: PretrainConfig, device: torch.device) -> tuple[Backbone, Method]:
    """The backbone and the method around it; raises ConfigError for what the settings cannot mean together."""
    torch.manual_seed(config.seed)
    backbone = create_backbone(config.backbone)
    method = build_method(config.method, backbone)
    check_recipe(method, backbone, config.augment, config.data)
    if config.train.parallel == "fsdp":
        check_sharding(
            method,
            precision=config.train.precision,
            measures_classifier=config.classifier is not None,
            find_lr=config.find_lr,
        )
    check_precision(method, backbone, config.augment, config.train, device)
    return backbone, method


@dataclass(frozen=True)
class _Images:
    """All images and the labelled ones. identity: of these and of the weights; seconds: that the first took to open."""

    all: ShardIndex
    labelled: ShardIndex | None
    identity: dict[str, str]
    seconds: float

    @classmethod
    def opened(cls, config: PretrainConfig, weights: dict[str, JSON] | None, device: torch.device) -> _Images:
        """Those of the settings; all processes must have found the same."""
        asked = time.perf_counter()
        index = open_images(config.data)
        seconds = time.perf_counter() - asked
        identity = {"images": _images(index)}
        read = "none" if weights is None else str(weights["sha256"])
        require_same("weights", config.backbone.weights or "a random network", read, device)
        if weights is not None:
            identity[STARTING_WEIGHTS] = read
        require_same("images", display_name(config.data.shards), index.fingerprint, device)
        labelled = open_labelled_images(config.data)
        if labelled is not None:
            identity["labelled images"] = _images(labelled)
            require_same("labelled images", labelled.called, labelled.fingerprint, device)
        return cls(index, labelled, identity, seconds)


def describe(
    config: PretrainConfig, method: Method, clock: Clock, accelerator: Accelerator, *, num_labelled: int
) -> None:
    """Print what a reader of the log wants to know of a run that begins."""
    progress = clock.progress(0)
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    labelled, num_processes = "", accelerator.num_processes
    if config.data.labelled is not None:
        beside = config.data.labelled.batch_size * num_processes * config.train.accumulate
        called = display_name(config.data.labelled.shards)
        labelled = f"{num_labelled} labelled images in {called}: {beside} with each global batch\n"
    print(
        f"{config.method.name} on {config.backbone.name}: {trained / 1e6:.2f} M trained parameters\n"
        f"{printable(f'initial weights: {method.backbone.origin}')}\n"
        f"{describe_launch(accelerator, config.train)}\n"
        f"{f'{COST}{chr(10)}' if config.train.deterministic else ''}"
        f"{clock.num_samples} images in {display_name(config.data.shards)}; global batch {clock.global_batch} = "
        f"{config.data.batch_size} per process * {num_processes} processes * {config.train.accumulate} accumulated\n"
        f"{labelled}"
        f"{progress.total_steps} steps, {progress.steps_per_epoch:.2f} per epoch; effective learning rate "
        f"{config.optim.effective_lr(clock.global_batch).value:g}\n"
        f"output: {config.run_directory} (settings in config.yaml, metrics in metrics.jsonl)",
        flush=True,
    )
    told = about_accumulation(
        method, accumulate=config.train.accumulate, micro_batch=clock.global_batch // config.train.accumulate
    )
    alone = about_batch_norm(
        method,
        shared=config.train.sync_batch_norm,
        num_processes=num_processes,
        batch_size=config.data.batch_size,
    )
    for line in filter(None, (told, alone)):
        print(printable(line), flush=True)
    for remark in filter(
        None, (about_class_token(method), *remarks(config.method, config.optim, config.augment, clock))
    ):
        print(printable(f"warning: {remark}"), flush=True)


def warn_of_labels(method: Method, unlabelled: ShardIndex, labelled: ShardIndex) -> None:
    """Say what is odd about the labelled images of a method that learns to classify."""
    if method.classifier is None:
        return
    warn_of_classes_without_labels(labelled, method.classifier.out_features)
    warn_of_other_classes(unlabelled, labelled)
    if (told := about_soft_labels(method, labelled)) is not None:
        print(printable(f"warning: {told}"), flush=True)


def warn_of_classes_without_labels(labelled: ShardIndex, num_classes: int) -> None:
    """Say which classes no labelled image is of: what is trained will guess others in their place."""
    missing = classes_without_labels(labelled, num_classes)
    if missing:
        which = f"class {missing[0]}: it" if len(missing) == 1 else f"the classes {some_of(missing, '')}: they"
        print(printable(f"warning: no labelled image is of {which} cannot be learnt."), flush=True)


def warn_of_other_classes(unlabelled: ShardIndex, labelled: ShardIndex) -> None:
    """Say where no class of the unlabelled images, by its name, is one of the labelled: they may be of another set."""
    found, learnt = unlabelled.class_names, labelled.class_names
    if found is not None and learnt is not None and not set(found) & set(learnt):
        print(
            printable(
                f"warning: {unlabelled.called} has images of {some_of(found, '')}, and none of the labelled classes "
                f"({some_of(learnt, '')}): is data.shards the right set?"
            ),
            flush=True,
        )


def _images(index: ShardIndex) -> str:
    """How many images there are, and which: packed or labelled again they are others."""
    return f"{len(index)} ({index.fingerprint[:8]})"


def _about(index: ShardIndex | None) -> JSON:
    """The images for run.json."""
    if index is None:
        return None
    return {"shards": index.source, "images": len(index), "fingerprint": index.fingerprint}


def _about_weights(backbone: Backbone) -> dict[str, JSON] | None:
    """What it starts from for run.json, None for random weights."""
    config, tensors = backbone.config, backbone.model.state_dict()
    if config.weights is None:
        return None
    return about_weights(config.weights, which=config.weights_from, sha256=backbone.origin.sha256, tensors=tensors)


def _expanded(pairs: Sequence[str], *, only_shown: bool) -> list[str]:
    """`expand` for a run, or for its settings on stdout: these get no expected time, and nothing is written."""
    if not only_shown:
        return expand(pairs, timed=PretrainConfig)
    with redirect_stdout(sys.stderr):
        return expand(pairs, packs=False)


def main(name: str) -> int:
    """The command line, called `name`, behind `commands/start.py`; returns the exit code."""
    arguments = sys.argv[1:]
    pairs, flags = without_flags(arguments)
    if not flags & {"--help", "-h"}:
        try:
            arguments = [*_expanded(pairs, only_shown="--print" in flags), *flags]
        except Exception as error:
            if "--debug" in flags:
                raise
            return refuse(error, running=False)
    return run_command(
        PretrainConfig, pretrain, command=name, argv=arguments, recipes=RECIPES, check=check_outline, shared=True
    )

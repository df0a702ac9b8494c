"""Settings and data that are wrong: each is refused in one sentence, before anything is trained or lost."""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np

from ssl_pipeline.files import write_array
from tests.ranks import start
from tests.runs import write_recipe
from tests.tiny import write_shards
from tests.torture.mutations import image
from tests.torture.outcome import Outcome

PROMISE = "one sentence of at most 500 characters, exit code 2 or 1, no file changed"
COMMANDS = {
    "pretrain": "ssl_pipeline.commands.start",
    "knn": "ssl_pipeline.eval.knn",
    "linear": "ssl_pipeline.eval.linear",
    "suite": "ssl_pipeline.eval.suite",
    "table": "ssl_pipeline.eval.table",
    "export": "ssl_pipeline.eval.export",
    "embed": "ssl_pipeline.commands.embed",
    "doctor": "ssl_pipeline.eval.doctor",
    "report": "ssl_pipeline.commands.report",
    "make_shards": "ssl_pipeline.packing.make_shards",
    "check_shards": "ssl_pipeline.data_tools.check_shards",
    "split_labels": "ssl_pipeline.data_tools.split_labels",
}


@dataclass(frozen=True)
class Case:
    """A command that must be refused with these words; {name} stands for a path of `Material`."""

    command: str
    arguments: tuple[str, ...]
    words: str
    environment: Mapping[str, str] = field(default_factory=dict)


def pretrain(arguments: str, words: str, **environment: str) -> Case:
    """A start of the tiny recipe with further arguments."""
    return Case("pretrain", ("recipe={recipe}", "output={output}", *arguments.split()), words, environment)


def other(command: str, arguments: str, words: str) -> Case:
    return Case(command, tuple(arguments.split()), words)


NUMBERS = [
    pretrain("optim.lr=1e400", "optim.lr.value must be a finite number"),
    pretrain("optim.lr=-1e-3", "optim.lr.value must be"),
    pretrain("optim.betas=[0.9,1]", "optim.betas must be at least 0 and below 1"),
    pretrain("optim.betas=[-0.1,0.9]", "optim.betas must be"),
    pretrain("optim.clip_norm=-1", "optim.clip_norm must be above 0"),
    pretrain("train.steps=0", "train.steps must be"),
    pretrain("train.steps=99999999999999999999", "train.steps must be"),
    pretrain("train.epochs=nan", "train.epochs must be"),
    pretrain("train.save_every=-5", "cannot be negative"),
    pretrain("train.save_every=101%", "at most 100%"),
    pretrain("train.keep_checkpoints=1", "train.keep_checkpoints must be at least 2"),
    pretrain("train.nan_budget=0", "train.nan_budget must be at least 1"),
    pretrain("data.batch_size=0", "data.batch_size must be at least 1"),
    pretrain("data.batch_size=1000", "larger than the data set"),
    pretrain("data.workers=-1", "data.workers must be at least 0"),
    pretrain("data.bad_sample_budget=1.5", "data.bad_sample_budget must be"),
    pretrain("data.max_pixels=0", "data.max_pixels must be"),
    pretrain("data.std=[0,1,1]", "data.std must be"),
    pretrain("data.mean=[1,2]", "data.mean must have 3 values"),
    pretrain("augment.global.size=0", "augment.global.size must be"),
    pretrain("augment.global.size=15", "multiple of the backbone's patch size"),
    pretrain("augment.global.count=0", "augment.global.count must be"),
    pretrain("augment.global.scale=[0.5,0.1]", "augment.global.scale must be"),
    pretrain("augment.global.flip_prob=2", "augment.global.flip_prob must be"),
    pretrain("method.teacher_momentum=1.0001", "method.teacher_momentum.value must be"),
    pretrain("method.teacher_momentum.value=1 method.teacher_momentum.final=1", "value must be below 1"),
    pretrain("method.centre_momentum=1", "method.centre_momentum must be"),
    pretrain("method.student_temperature=0", "method.student_temperature must be"),
    pretrain("backbone.drop_path=1", "backbone.drop_path must be"),
    pretrain("backbone.arguments.depth=0", "backbone.arguments.depth must be at least 1"),
    pretrain("backbone.arguments.num_heads=7", "with backbone.arguments depth=1, embed_dim=24"),
    pretrain("backbone.arguments.embed_dim=-8", "backbone.arguments.embed_dim must be at least 1"),
    pretrain("seed=-1", "seed must be at least 0"),
    pretrain("optim.freeze_backbone_for=100%", "freezes the backbone"),
    pretrain("knn.every=1 knn.train={shards} knn.val={shards} knn.k=0", "knn.k must be"),
    pretrain("knn.train={shards} knn.val={shards} knn.temperature=0 knn.every=1", "knn.temperature must be"),
]
NAMES = [
    pretrain("backbone.name=resnet18.a1_in1k", "write backbone.name=resnet18 backbone.weights=a1_in1k"),
    pretrain("backbone.name=hf-hub:timm/resnet18.a1_in1k", "write backbone.name=resnet18 backbone.weights=a1_in1k"),
    pretrain("backbone.name=timm/resnet18", "write backbone.name=resnet18"),
    pretrain("backbone.name=resnet8000", "No timm model"),
    pretrain("backbone.weights={folder}/none.pth", "does not exist"),
    pretrain("backbone.weights={shards}", "is a directory without weights"),
    pretrain("backbone.weights={text}", "cannot read weights"),
    pretrain("method.name=dno", "Did you mean"),
    pretrain("optm.lr=1", "Unknown key 'optm'"),
    pretrain("train.compil=true", "Did you mean 'train.compile'?"),
    pretrain("data.shards={folder}/none", "There is no directory or file"),
    pretrain("data.shards={empty}", "no"),
    pretrain("data.shards={text}", "is truncated"),
    pretrain("images={shards} data.shards={shards}", "Give one of the two"),
    pretrain("data.keep={folder}/none.npy", "none.npy"),
    pretrain("data.keep={text}", "data.keep"),
    pretrain("data.keep={floats}", "data.keep"),
    pretrain("data.labels={floats}", "data.labels"),
    pretrain("data.labelled.shards={shards}", "does not use data.labelled"),
    pretrain("method.name=fixmatch", "needs"),
    Case("pretrain", ("recipe={recipe}", "output={text}"), "must be a directory"),
    pretrain("train.precision=fp16", "needs a GPU"),
    pretrain("train.precision=fp32", "must be one of bf16, fp16, no"),
    pretrain("recipe={text}", "recipe= is given 2 times"),
    pretrain("--epochs=3", "is not of the form key=value"),
    Case("pretrain", ("recipe={text}", "output={output}"), "No recipe"),
    Case("pretrain", ("images=[a,b]", "output={output}"), "takes one folder or zip"),
    Case("pretrain", ("images={empty}", "output={output}", "recipe=digits_simclr"), "has no image file"),
]
ENVIRONMENT = [
    pretrain("", "no RANK", WORLD_SIZE="2"),
    pretrain("", "WORLD_SIZE=two, which must be a whole number", WORLD_SIZE="two"),
    pretrain("", "WORLD_SIZE=0, which must be a whole number from 1 on", WORLD_SIZE="0"),
    pretrain("seed=-1", "seed must be at least 0", RANK="1"),
    pretrain("", "RANK=2, which must be below", RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="x"),
]
SHARDS = [
    pretrain("data.shards={no_images}", "no"),
    pretrain("data.shards={two_images}", "images"),
    pretrain("data.shards={nameless}", "no"),
    pretrain("data.shards={word_labels} knn.every=1 knn.train={word_labels} knn.val={shards}", "label"),
    pretrain("knn.every=1 knn.train={unlabelled} knn.val={shards}", "label"),
]
EVALUATION = [
    other("knn", "backbone=raw_pixels train={shards} test={unlabelled}", "label"),
    other("knn", "backbone=raw_pixels train={shards} test={word_labels}", "label"),
    other("knn", "backbone=raw_pixels train={shards} test={shards} k=49", "k"),
    other("knn", "backbone=raw_pixels train={shards} test={shards} k=0", "must be above 0"),
    other("knn", "backbone=raw_pixels train={shards} test={shards} temperature=-1", "temperature must be"),
    other(
        "knn",
        "backbone=resnet18 weights={folder}/none.pth train={shards} test={shards}",
        "weights={folder}/none.pth does not exist",
    ),
    other("knn", "run={folder} train={shards} test={shards}", "has no backbone.safetensors"),
    other("knn", "run={folder}/none train={shards} test={shards}", "must be the directory of a run"),
    other("knn", "train={shards} test={shards}", "Give either run=DIR or backbone=NAME"),
    other("linear", "backbone=raw_pixels train={shards} test={shards} epochs=0", "epochs must be"),
    other("linear", "backbone=raw_pixels train={shards} test={empty}", "no"),
    other("suite", "backbone=raw_pixels size=0 train={shards} test={shards}", "size must be"),
    other("table", "run={folder}/none", "none"),
    other("doctor", "run={folder}/none", "none"),
    other("report", "run={folder}/none", "none"),
    other("export", "run={folder}/none output={output}", "must be the directory of a run"),
    other("embed", "backbone=raw_pixels source={empty} output={output}.npz", "source="),
    other("embed", "backbone=raw_pixels source={shards} output={output}.xls", "must end in"),
    other("make_shards", "source={empty} output={output}", "has no image file"),
    other("make_shards", "source={folder}/none output={output}", "does not exist"),
    other("make_shards", "source={shards} output={output} holdout=100%", "must be a share"),
    other("make_shards", "source=digits output={full}", "is not empty"),
    other("make_shards", "source=digits output={output} samples_per_shard=0", "samples_per_shard must be"),
    other("check_shards", "{empty}", "no"),
    other("check_shards", "{folder}/none", "There is no directory or file"),
    other("split_labels", "shards={unlabelled} output={output} labels_per_class=1", "label"),
    other("split_labels", "shards={shards} output={output} labels_per_class=99", "99"),
]
CHAPTERS = {
    "numbers": NUMBERS,
    "names and files": NAMES,
    "environment": ENVIRONMENT,
    "shards of others": SHARDS,
    "evaluation and tools": EVALUATION,
}


def material(folder: Path) -> dict[str, str]:
    """The paths that the cases name."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = write_shards(folder / "shards")
    text = folder / "text.txt"
    text.write_text("no settings, no tensors, no tar\n")
    full = folder / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    write_array(folder / "floats.npy", np.linspace(0, 1, 7))
    png = image("PNG")
    made = {
        "no_images": [("a.txt", b"words"), ("b.txt", b"words")],
        "two_images": [(f"{number}.{kind}", png) for number in range(20) for kind in ("left.png", "right.png")],
        "nameless": [(".png", png), ("", png)],
        "word_labels": [pair for n in range(12) for pair in ((f"{n:02d}.png", png), (f"{n:02d}.cls", b"cat"))],
        "unlabelled": [(f"{number:02d}.png", png) for number in range(12)],
    }
    for name, members in made.items():
        write_tar(folder / name / "a-000000.tar", members)
    (folder / "empty").mkdir()
    recipe = write_recipe(folder / "recipe.yaml", "dino", shards)
    names = ("shards", "empty", "full", *made)
    return {
        **{name: str(folder / name) for name in names},
        "folder": str(folder),
        "text": str(text),
        "floats": str(folder / "floats.npy"),
        "recipe": str(recipe),
    }


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def torture_inputs(folder: Path, *, most: int | None = None) -> list[Outcome]:
    """Every case, or the first `most` of each chapter."""
    places, outcomes = material(folder), []
    for chapter, cases in CHAPTERS.items():
        outcome = Outcome(chapter, PROMISE)
        for number, case in enumerate(cases[:most]):
            paths = places | {"output": str(folder / "out" / f"{chapter.replace(' ', '-')}-{number}")}
            failure = _failure(case, paths)
            outcome.count(None if failure is None else f"{case.command} {' '.join(case.arguments)}: {failure}")
        outcomes.append(outcome)
    return outcomes


def _failure(case: Case, paths: Mapping[str, str]) -> str | None:
    argv = [argument.format(**paths) for argument in case.arguments]
    before = _files(Path(paths["folder"]))
    child = start(called, COMMANDS[case.command], argv, dict(case.environment))
    code, printed = child.wait(), child.printed()
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    if "Traceback" in printed:
        return f"a traceback: {printed[-300:]}"
    if code not in (1, 2) or not errors:
        return f"exit code {code} and no error: {printed[-200:]}"
    told = printed[printed.index("error") :]
    if case.words.format(**paths) not in told:
        return f"says {told[:300]!r}, not {case.words!r}"
    if re.search(r"Errno|unexpected|--debug shows|Error:", told):
        return f"speaks of the inside: {told[:300]!r}"
    if max(map(len, told.splitlines())) > 520:
        return f"{len(told)} characters"
    changed = sorted(name for name, size in _files(Path(paths["folder"])).items() if before.get(name) != size)
    return f"left {changed[:3]}" if changed else None


def called(module: str, argv: list[str], environment: dict[str, str]) -> None:
    """A command as its entry point calls it; leaves with its exit code."""
    function: Callable[[], int] = import_module(module).command
    with mock.patch.dict(os.environ, environment), mock.patch.object(sys, "argv", ["command", *argv]):
        sys.exit(function())


def _files(folder: Path) -> dict[str, int]:
    """Sizes of all files but indexes, which every reader of shards makes, and locks."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and ".index" not in path.parts and path.name != ".lock"
    }

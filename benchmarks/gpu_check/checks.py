"""The checks, in the order in which they run: what is quick and must work comes first."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_check.processes import Row, pretrain, report, rows_of, run_python, tests
from benchmarks.gpu_check.settings import Check, Found, Place, StepFigures
from benchmarks.images import images_for
from benchmarks.settings import BenchmarkConfig
from ssl_pipeline.files import JSON
from ssl_pipeline.training.sharding import OLDEST_TORCH, torch_is_too_old

SAME, SIMILAR = 1e-6, 0.05  # relative gaps between losses: of a resumed run on a CPU, of other formats and layouts
SAME_ON_GPU = 1e-2  # kernels add in no fixed order, and a few steps let that grow
PUBLISHED, PUBLISHED_EPOCHS = 84.7, 200  # k-NN of lightly's CIFAR-10 benchmark, as the recipe says
BESIDE_TRAINING = 40.0  # seconds of a start and of four rounds of k-NN on 60,000 images
LEAST_GAIN = 5.0  # points over random initialisation; on a CPU two epochs of a network of 0.4 M parameters gain 11
RING, COLOURS, NO_SYNC = (
    "tests/data/workers/test_ring.py",
    "tests/augment/test_photometric.py",
    "tests/methods/test_no_sync.py",
)
WITHOUT_A_GPU = ("tests/test_machine.py",)


def run_tests(place: Place, *, paths: tuple[str, ...], without: tuple[str, ...] = ()) -> Found:
    """The tests that need a GPU; where there is none those beside them, which do the same on a CPU."""
    ignored = [f"--ignore={path}" for path in without]
    if place.config.is_tiny:
        counts = tests(place, WITHOUT_A_GPU if paths == ("tests",) else paths, "-m", "not gpu and not slow")
    else:
        counts = tests(place, paths, "-m", "gpu", *ignored)
    passed, failed, skipped = counts
    figures: dict[str, JSON] = {"passed": passed, "failed": failed, "skipped": skipped}
    said = f"{passed} passed, {failed} failed, {skipped} skipped"
    if place.config.is_tiny:
        said += "; says nothing of a GPU" if paths == ("tests",) else "; on the CPU"
    return Found("failed" if failed else "passed" if passed else "skipped", said, figures)


def digits(place: Place) -> str:
    """The setting of the shards of the digits, made at the first call."""
    shards = place.config.output / "digits"
    if not shards.exists():
        run_python(place, "-m", "data_tools.make_shards", "source=digits", f"output={shards}", "workers=1")
    return f"data.shards={shards}"


def short(place: Place, name: str, steps: int, *settings: str, **limits: tuple[Path, int]) -> list[Row]:
    """A run of digits_dino without monitors."""
    usual = ("recipe=digits_dino", digits(place), "knn=null", "data.workers=1", "train.log_every=5")
    return pretrain(place, name, *usual, f"train.steps={steps}", *settings, **limits)


def kill_and_resume(place: Place) -> Found:
    """A run that is killed and goes on ends as one that is not."""
    shutil.rmtree(place.folder, ignore_errors=True)
    steps, settings = (20, 5) if place.config.is_tiny else (60, 10), "train.save_every={}"
    total, every = steps
    whole = short(place, "whole", total, settings.format(every))
    run = place.folder / "killed"
    short(place, "killed", total, settings.format(every), kill_at_step=(run, total // 2))
    stopped_at = int(rows_of(run)[-1]["step"])
    again = short(place, "killed", total, settings.format(every))
    gap = relative_gap(again[-1]["loss"], whole[-1]["loss"])
    allowed = SAME_ON_GPU if torch.cuda.is_available() else SAME
    figures: dict[str, JSON] = {"killed_after_step": stopped_at, "steps": total, "loss_gap": gap}
    said = f"killed after step {stopped_at}, resumed to {total}; last loss differs by {gap:.2g}"
    return Found("passed" if gap <= allowed else "failed", said, figures)


def precision(place: Place) -> Found:
    """The loss of a few steps in each format."""
    shutil.rmtree(place.folder, ignore_errors=True)
    formats = ("no", "bf16", "fp16") if torch.cuda.is_available() else ("no", "bf16")
    losses = {one: short(place, one, 10, f"train.precision={one}")[-1]["loss"] for one in formats}
    gaps = {one: relative_gap(loss, losses["no"]) for one, loss in losses.items()}
    said = ", ".join(f"{one}: loss {loss:.4f} ({gaps[one]:.1%} off)" for one, loss in losses.items())
    worst = max(gaps.values())
    figures: dict[str, JSON] = {"losses": {**losses}, "gaps": {**gaps}}
    return Found("passed" if worst <= SIMILAR else "failed", said, figures)


def compile_step(place: Place) -> Found:
    """The step of DINO with and without torch.compile."""
    if why_not := BenchmarkConfig(compile=True).why_not_compiled():
        return Found("skipped", why_not)
    eager, compiled = (_step(place, "dino_vits16", compiled=flag) for flag in (False, True))
    gain = compiled.images_per_second / eager.images_per_second
    gap = relative_gap(compiled.loss, eager.loss)
    figures: dict[str, JSON] = {"gain": gain, "loss_gap": gap, "eager": asdict(eager), "compiled": asdict(compiled)}
    said = f"{gain:.2f} times as fast, {compiled.seconds_of_first_steps:.0f} s for the first steps"
    return Found("passed" if gap <= SIMILAR else "failed", said, figures)


def fsdp(place: Place) -> Found:
    """The step of DINO whole, and shared out over a group of this process alone: the same numbers, and its price."""
    if torch_is_too_old():
        return Found("skipped", f"needs torch {'.'.join(map(str, OLDEST_TORCH))}, this is {torch.__version__}")
    whole, shared = (_step(place, "dino_vits16", sharded=flag) for flag in (False, True))
    slower = shared.seconds / whole.seconds
    gap = relative_gap(shared.last_loss, whole.last_loss)
    figures: dict[str, JSON] = {"slower": slower, "loss_gap": gap, "whole": asdict(whole), "shared": asdict(shared)}
    said = f"one process takes {slower:.2f} times as long, last loss differs by {gap:.2g}"
    return Found("passed" if gap <= (SIMILAR if torch.cuda.is_available() else SAME) else "failed", said, figures)


def cifar10(place: Place) -> Found:
    """SimCLR on CIFAR-10 for as many epochs as fit, and its k-NN beside the published one."""
    if place.config.is_tiny:
        rows = pretrain(
            place, "run", "recipe=digits_simclr", digits(place), "train.epochs=1", "data.workers=1",
            f"knn.train={place.config.output / 'digits'}", f"knn.val={place.config.output / 'digits'}",
        )  # fmt: skip
        return Found("passed", f"digits: k-NN {rows[-1]['knn_top1']:.1f} %", {"knn_top1": rows[-1]["knn_top1"]})
    folder = place.config.cifar10
    if not (folder / "train").exists() or not (folder / "test").exists():
        return Found("skipped", f"cifar10={folder} has no train and test; docs/images.md says how they are made")
    shutil.rmtree(place.folder, ignore_errors=True)
    usual = (
        "recipe=cifar10_simclr_resnet18",
        f"data.shards={folder / 'train'}",
        "data.cache=true",
        "train.log_every=20",
    )
    rate = pretrain(place, "trial", *usual, "knn=null", "train.steps=100")[-1]["images_per_second"]
    epochs = max(int(0.8 * (place.seconds_left - BESIDE_TRAINING) * rate / 50_000), 1)
    images = (f"knn.train={folder / 'train'}", f"knn.val={folder / 'test'}")
    knn = (*images, f"knn.every={max(epochs // 3, 1)}ep", "knn.at_start=true")
    rows = pretrain(place, "run", *usual, *knn, f"train.epochs={epochs}")
    curve = {f"{row['epoch']:.3g}": row["knn_top1"] for row in rows if "knn_top1" in row}
    figures: dict[str, JSON] = {"images_per_second": rate, "epochs": epochs, "knn_top1": {**curve}}
    said = (
        f"{rate:,.0f} images/s; k-NN {rows[-1]['knn_top1']:.1f} % after {epochs} epochs "
        f"({PUBLISHED} % after {PUBLISHED_EPOCHS})"
    )
    began = next(iter(curve.values()))
    if rows[-1]["knn_top1"] < began + LEAST_GAIN:
        return Found("failed", f"{said}; it began at {began:.1f} %, and learns nothing", figures)
    return Found("passed", said, figures)


def training_step(place: Place, *, recipe: str) -> Found:
    """The step of a recipe on noise, then a run on photographs with crops in the worker and on the device."""
    shutil.rmtree(place.folder, ignore_errors=True)
    step = _step(place, recipe, compiled=False)
    runs: dict[str, JSON] = {}
    with images_for(
        BenchmarkConfig(imagenet=place.config.imagenet), 64 if place.config.is_tiny else 512
    ).in_shards() as shards:
        crops = {"worker": (), "device": (), "device, copy_stream": ("train.copy_stream=true",)}
        for name, more in crops.items():
            if place.config.is_tiny and more:
                continue
            rows = _run_on(place, recipe, shards, f"data.crop_on={name.partition(',')[0]}", *more)
            runs[name] = {key: rows[-1][key] for key in ("images_per_second", "data_wait")}
    peak = "" if step.peak_gb is None else f", {step.peak_gb:.1f} GB"
    mfu = "" if step.mfu is None else f", MFU {step.mfu:.0%}"
    said = f"{step.images_per_second:,.0f} images/s{mfu}{peak}"
    for name, found in runs.items():
        assert isinstance(found, dict)
        said += f"; {name}: {found['images_per_second']:,.0f} images/s, waits {found['data_wait']:.0%}"
    return Found("passed", said, {"step": asdict(step), "runs": runs})


def _step(place: Place, recipe: str, *, compiled: bool = False, sharded: bool = False) -> StepFigures:
    tiny = ["tiny", "precision=no"] if place.config.is_tiny else []
    flags = {"compile": compiled, "sharded": sharded}
    return report(place, recipe, *(f"{name}={str(flag).lower()}" for name, flag in flags.items()), *tiny)


def _run_on(place: Place, recipe: str, shards: Path, crop_on: str, *more: str) -> list[Row]:
    """A few steps of the whole path; the last row tells of steps in which all is warm."""
    if place.config.is_tiny:
        settings = ["recipe=digits_dino", "data.batch_size=16", "data.workers=1", "train.steps=4", "train.log_every=2"]
    else:
        settings = [f"recipe={recipe}", f"data.workers={place.config.workers}", "train.steps=60", "train.log_every=20"]
    name = "-".join([crop_on.partition("=")[2], *more])
    return pretrain(place, name, *settings, f"data.shards={shards}", "knn=null", "train.save_every=0", crop_on, *more)


def relative_gap(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-12)


CHECKS = (
    Check(
        "cuda_tests",
        "tests that need a GPU",
        150,
        partial(run_tests, paths=("tests",), without=(RING, COLOURS, NO_SYNC)),
    ),
    Check("pinned_ring", "page-locked memory", 40, partial(run_tests, paths=(RING,))),
    Check("compiled_colours", "compiled colours", 90, partial(run_tests, paths=(COLOURS,))),
    Check("no_host_sync", "no step waits", 120, partial(run_tests, paths=(NO_SYNC,))),
    Check("kill_and_resume", "killed and resumed", 120, kill_and_resume),
    Check("precision", "bf16 and fp16", 120, precision),
    Check("compile", "compiled DINO ViT-S/16", 180, compile_step),
    Check("fsdp", "FSDP2", 90, fsdp),
    Check("cifar10", "SimCLR on CIFAR-10", 180, cifar10),
    Check("dino_vits16", "DINO ViT-S/16", 150, partial(training_step, recipe="dino_vits16")),
    Check("dinov2_vits14", "DINOv2 ViT-S/14", 150, partial(training_step, recipe="dinov2_vits14")),
    Check("dinov2_vitl16", "DINOv2 ViT-L/16", 180, partial(training_step, recipe="dinov2_vitl16_short")),
)

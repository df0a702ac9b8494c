"""Which defaults should change, by what the checks have measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.gpu_check.settings import Found
from ssl_pipeline.files import JSON

WORTH_COMPILING, WORTH_A_CHANGE = 1.1, 1.05  # times as fast
HIGH_WAIT, LOW_MFU, LITTLE_MEMORY = 0.1, 0.25, 0.3

STEPS = ("dino_vits16", "dinov2_vits14", "dinov2_vitl16")


def advice(found: Mapping[str, Found], *, gpu_bytes: int | None, tiny: bool) -> list[str]:
    """A sentence for each default that should change on this machine, and for each thing that does not work.

    Figures of tiny sizes say nothing of defaults.
    """
    return [*_broken(found)] if tiny else [*_broken(found), *_compiled(found), *_of_steps(found, gpu_bytes)]


def _broken(found: Mapping[str, Found]) -> Iterator[str]:
    for name, one in found.items():
        if one.state == "failed":
            yield f"{name} failed: {one.said}. Mend that first."
        elif one.state == "too long":
            yield f"{name} took longer than its time. only={name} patience=3 gives it more."


def _compiled(found: Mapping[str, Found]) -> Iterator[str]:
    gain = _number(found.get("compile"), "gain")
    if gain is None:
        return
    if gain >= WORTH_COMPILING:
        yield f"train.compile=auto should be the default: a step is {gain:.2f} times as fast."
    else:
        yield f"train.compile may stay false: a step is {gain:.2f} times as fast."


def _of_steps(found: Mapping[str, Found], gpu_bytes: int | None) -> Iterator[str]:
    for name in STEPS:
        if name not in found or "runs" not in found[name].figures:
            continue
        rates, waits = (
            {who: _number_in(run, key) for who, run in _runs(found[name])} for key in ("images_per_second", "data_wait")
        )
        worker, device, beside = (rates.get(who) for who in ("worker", "device", "device, copy_stream"))
        if worker and device and worker >= WORTH_A_CHANGE * device:
            yield f"data.crop_on=auto should mean worker for {name}: {worker / device:.2f} times the images per second."
        if device and beside and beside >= WORTH_A_CHANGE * device:
            yield f"train.copy_stream should be true for {name}: {beside / device:.2f} times the images per second."
        best = max((rate, who) for who, rate in rates.items() if rate is not None)[1]
        wait = waits[best]
        if wait is not None and wait > HIGH_WAIT:
            yield f"{name} waits {wait:.0%} of the time for images: more data.workers, or make_shards short_side=320."
        step = found[name].figures["step"]
        mfu, peak = _number_in(step, "mfu"), _number_in(step, "peak_gb")
        if mfu is not None and mfu < LOW_MFU:
            yield f"{name} reaches {mfu:.0%} of the GPU's peak: try a larger data.batch_size, and train.compile=auto."
        if peak is not None and gpu_bytes and peak * 1e9 < LITTLE_MEMORY * gpu_bytes:
            yield f"{name} takes {peak:.0f} of {gpu_bytes / 1e9:.0f} GB: data.batch_size has room to grow."


def _runs(one: Found) -> list[tuple[str, JSON]]:
    runs = one.figures["runs"]
    return list(runs.items()) if isinstance(runs, dict) else []


def _number(one: Found | None, key: str) -> float | None:
    return None if one is None else _number_in(one.figures, key)


def _number_in(figures: JSON, key: str) -> float | None:
    value = figures.get(key) if isinstance(figures, dict) else None
    return float(value) if isinstance(value, int | float) else None

"""`find_lr=true`: the learning-rate range test of a run, as find_lr.json and a plot; it starts no run."""

from __future__ import annotations

from ssl_pipeline.config import printable
from ssl_pipeline.eval.page.range_plot import range_plot
from ssl_pipeline.files import JSON, write_json, write_text
from ssl_pipeline.training.range_test import RangeTest, range_test
from ssl_pipeline.training.run import Run

COARSE = 1.5  # times from one rate to the next: 100 steps take 1.2
FILE, PLOT = "find_lr.json", "find_lr.svg"


def find_lr(run: Run) -> None:
    """Make the test, write both files into the run's directory and print what it suggests; the first process does."""
    is_first = run.accelerator.is_main_process
    found = range_test(run, say=lambda text: print(text, flush=True) if is_first else None)
    if not is_first:
        return
    folder, own = run.output.path, run.optim.effective_lr(run.clock.global_batch).value
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, report(found, run, own))
    if found.rates:
        write_text(folder / PLOT, plot(found, own))
    print(printable(f"{conclusion(found, run.optim.lr.value)} Written to {folder / FILE} and {PLOT} next to it."))


def report(found: RangeTest, run: Run, own: float) -> dict[str, JSON]:
    """What find_lr.json holds: effective rates, and as `optim.lr` the suggestion and the present value."""
    lowest = found.rates[found.lowest] if found.rates else None
    return {
        "suggested_optim_lr": found.suggestion,
        "present_optim_lr": run.optim.lr.value,
        "present_effective_lr": own,
        "effective_lr_of_fastest_fall": found.rates[found.steepest] if found.steepest is not None else None,
        "effective_lr_of_lowest_loss": lowest,
        "effective_lr_per_optim_lr": found.per_setting,
        "global_batch": run.clock.global_batch,
        "optimizer": run.optim.name,
        "ended": found.note,
        "effective_lr": found.rates,
        "loss": found.losses,
        "loss_without_learning": found.alone,
        "smoothed_loss": found.smoothed,
    }


def plot(found: RangeTest, own: float) -> str:
    marks = [("own", "now", own)]
    if found.suggestion is not None:
        marks.append(("mark", "suggested", found.suggestion * found.per_setting))
    return range_plot(found.rates, found.losses, found.smoothed, marks)


def conclusion(found: RangeTest, own: float) -> str:
    """One or two sentences: what to set, and what it is now."""
    ended = f"The test ended after {len(found.rates)} steps: {found.note}."
    if len(found.rates) > 1 and (factor := found.rates[1] / found.rates[0]) > COARSE:
        ended += f" The run has few steps, so each rate is {factor:.2g} times the one before; a longer run is finer."
    if found.suggestion is None:
        return (
            f"{ended} The loss never fell, so nothing is suggested; optim.lr={own:g} stays. Look at the plot, and "
            "whether the loss falls in a short run."
        )
    fastest = found.rates[found.steepest] if found.steepest is not None else own
    return (
        f"{ended} The loss fell fastest at an effective rate of {fastest:.2g} and was lowest at "
        f"{found.rates[found.lowest]:.2g}; suggested: optim.lr={found.suggestion:.2g} (now {own:g})."
    )

"""python -m benchmarks [only=input,step] [rounds=5] [output=runs/benchmarks] ..."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from benchmarks.evaluation import compare_knn, compare_linear
from benchmarks.input import compare_end_to_end, compare_input, compare_photometric
from benchmarks.parts import compare_ema, compare_head, compare_nt_xent
from benchmarks.report import as_json, as_table
from benchmarks.rounds import Comparison, describe, run_rounds
from benchmarks.settings import BenchmarkConfig, Name
from benchmarks.start_up import compare_start_up, growth_table, measure_growth
from benchmarks.step import compare_steps
from benchmarks.streams import compare_scaling
from ssl_pipeline.config import ConfigError, RunError, run_command
from ssl_pipeline.files import JSON, write_json

BENCHMARKS: dict[Name, Callable[[BenchmarkConfig], Iterator[Comparison]]] = {
    "input": compare_input,
    "end_to_end": compare_end_to_end,
    "scaling": compare_scaling,
    "photometric": compare_photometric,
    "step": compare_steps,
    "ema": compare_ema,
    "head": compare_head,
    "nt_xent": compare_nt_xent,
    "knn": compare_knn,
    "linear": compare_linear,
    "start_up": compare_start_up,
}


def run_benchmarks(config: BenchmarkConfig) -> list[str]:
    """Run what `only` names, printing each table and writing results.json after it; returns what failed, and why."""
    hardware, comparisons, failed = config.hardware(), list[JSON](), list[str]()
    results: dict[str, JSON] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "settings": config.model_dump(mode="json"),
        "comparisons": comparisons,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    print(f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores", flush=True)

    def report(table: str) -> None:
        print(f"\n{table}", flush=True)
        write_json(config.output / "results.json", results)

    for name in BENCHMARKS:
        for measured in _measured(name, config) if not config.only or name in config.only else ():
            comparisons.append(as_json(measured))
            failed += [f"{measured.name}: {who}: {reason}" for who, reason in measured.failed.items()]
            report(as_table(measured, peak_flops=config.peak_flops()))
    if not config.only or "cost_growth" in config.only:
        results["cost_growth"] = growth = measure_growth(config)
        report(growth_table(growth))
    return failed


def _measured(name: Name, config: BenchmarkConfig) -> Iterator[Comparison]:
    """The comparisons of one benchmark; where it breaks, the others still have their turn."""
    measure = partial(run_rounds, rounds=config.rounds, seconds=config.seconds, shortest=config.shortest)
    try:
        for comparison in BENCHMARKS[name](config):
            yield measure(comparison, device=config.torch_device())
    except ConfigError:
        raise
    except Exception as error:
        yield Comparison(name, "", failed={name: describe(error)})


def main(config: BenchmarkConfig) -> None:
    with warnings.catch_warnings():  # peers use what torch is about to rename
        warnings.simplefilter("ignore", FutureWarning)
        failed = run_benchmarks(config)
    print(f"\n{config.output / 'results.json'}")
    if failed:
        raise RunError(f"Not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run_command(BenchmarkConfig, main, command="python -m benchmarks"))

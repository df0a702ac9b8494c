"""python -m benchmarks [only=input,step] [rounds=5] [output=runs/benchmarks] ..."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from benchmarks.cost_growth import CostGrowth, measure
from benchmarks.end_to_end import compare_end_to_end
from benchmarks.hardware import describe_hardware, peak_flops
from benchmarks.input import compare_input
from benchmarks.linear import compare_linear
from benchmarks.nearest import compare_knn
from benchmarks.parts import compare_ema, compare_head, compare_nt_xent
from benchmarks.photometric import compare_photometric
from benchmarks.report import as_json, as_table, growth_table
from benchmarks.rounds import Comparison, Outcome, describe, run_rounds
from benchmarks.scaling import compare_scaling
from benchmarks.settings import BenchmarkConfig, Name
from benchmarks.start_up import compare_start_up
from benchmarks.step import compare_steps
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
FEW = CostGrowth(shards=(2, 20), samples=(2_000, 4_000), world_sizes=(1, 2), rounds=1)  # for size=tiny


def run_benchmarks(config: BenchmarkConfig) -> dict[str, JSON]:
    """Run what `only` names, printing a table after each comparison; returns what stands in results.json."""
    hardware = describe_hardware(config.torch_device())
    comparisons: list[JSON] = []
    results: dict[str, JSON] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "settings": config.model_dump(mode="json"),
        "comparisons": comparisons,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    print(f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores", flush=True)
    for name, compare in BENCHMARKS.items():
        if config.only and name not in config.only:
            continue
        for report in _reports(name, compare, config):
            comparisons.append(report)
            print(f"\n{as_table(report)}", flush=True)
            write_json(config.output / "results.json", results)
    if not config.only or "cost_growth" in config.only:
        growth = measure(FEW if config.chosen_size() == "tiny" else CostGrowth(rounds=min(config.rounds, 3)))
        results["cost_growth"] = growth
        print(f"\n{growth_table(growth)}", flush=True)
        write_json(config.output / "results.json", results)
    return results


def _reports(
    name: str, compare: Callable[[BenchmarkConfig], Iterator[Comparison]], config: BenchmarkConfig
) -> Iterator[dict[str, JSON]]:
    """The measured comparisons of one benchmark; where it breaks, the others still have their turn."""
    device = config.torch_device()
    peak = peak_flops(device, config.peak_tflops)
    try:
        for comparison in compare(config):
            outcome = run_rounds(
                comparison, rounds=config.rounds, seconds=config.seconds, device=device, shortest=config.shortest
            )
            yield as_json(outcome, peak_flops=peak)
    except ConfigError:
        raise
    except Exception as error:
        nothing = Outcome(Comparison(name, "", ()), {}, {}, {name: describe(error)})
        yield as_json(nothing, peak_flops=peak)


def failures(results: dict[str, JSON]) -> list[str]:
    """`comparison: contestant: reason` for each contestant that raised."""
    comparisons = results["comparisons"]
    assert isinstance(comparisons, list)
    return [
        f"{comparison['name']}: {name}: {reason}"
        for comparison in comparisons
        for name, reason in comparison["failed"].items()
    ]


def main(config: BenchmarkConfig) -> None:
    with warnings.catch_warnings():  # peers use what torch is about to rename
        warnings.simplefilter("ignore", FutureWarning)
        results = run_benchmarks(config)
    print(f"\n{config.output / 'results.json'}")
    failed = failures(results)
    if failed:
        raise RunError(f"Not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run_command(BenchmarkConfig, main, command="python -m benchmarks"))

"""python -m benchmarks.gpu_check [only=compile,cifar10] [minutes=15] [output=runs/gpu_check]; `make gpu-check`."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_check.advice import advice
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.processes import CheckError, TookTooLongError
from benchmarks.gpu_check.settings import Check, Found, GpuCheckConfig, Place
from benchmarks.settings import BenchmarkConfig
from ssl_pipeline.config import RunError, printable, run_command
from ssl_pipeline.files import JSON, write_json

NOT_SEEN = ("failed", "too long", "no time")  # states that end the command with an exit code of 1


def run_checks(config: GpuCheckConfig) -> dict[str, Found]:
    """Run what `only` names, a line and a new gpu_check.json after each."""
    config.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * config.minutes
    hardware = BenchmarkConfig().hardware()
    print(f"{hardware.get('gpu', hardware['cpu'])}, {'tiny' if config.is_tiny else 'large'} sizes", flush=True)
    found: dict[str, Found] = {}
    lines: list[JSON] = []
    for check in CHECKS:
        if config.only and check.name not in config.only:
            continue
        began = time.monotonic()
        found[check.name] = one = _run(check, config, ends)
        seconds = time.monotonic() - began
        print(printable(f"{check.what:32} {one.state:9} {seconds:6.1f} s  {one.said}", longest=None), flush=True)
        line: dict[str, JSON] = {"check": check.name, "state": one.state, "seconds": round(seconds, 1)}
        lines.append({**line, "limit": check.limit, "said": one.said, **one.figures})
        report: dict[str, JSON] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware,
            "size": "tiny" if config.is_tiny else "large",
            "checks": lines,
            "advice": advice(found, gpu_bytes=_gpu_bytes(hardware), tiny=config.is_tiny),
        }
        write_json(config.output / "gpu_check.json", report)
    return found


def _run(check: Check, config: GpuCheckConfig, ends: float) -> Found:
    left = ends - time.monotonic()
    if left <= 0:
        return Found("no time", f"minutes={config.minutes:g} are over")
    limit = min(config.patience * check.limit, left)
    place = Place(config, (config.output / check.name).resolve(), time.monotonic() + limit)
    try:
        return check.run(place)
    except TookTooLongError:
        return Found("too long", f"not done in {limit:.0f} s")
    except CheckError as error:
        return Found("failed", str(error))
    except Exception as error:  # of whatever breaks on a new machine: the other checks still have their turn
        return Found("failed", f"{type(error).__name__}: {error}")


def _gpu_bytes(hardware: dict[str, JSON]) -> int | None:
    found = hardware.get("gpu_bytes")
    return found if isinstance(found, int) else None


def main(config: GpuCheckConfig) -> None:
    found = run_checks(config)
    for sentence in advice(found, gpu_bytes=_gpu_bytes(BenchmarkConfig().hardware()), tiny=config.is_tiny):
        print(printable(f"advice: {sentence}", longest=None))
    print(config.output / "gpu_check.json")
    broken = [f"{name} ({one.state})" for name, one in found.items() if one.state in NOT_SEEN]
    if broken:
        raise RunError(f"Not passed: {', '.join(broken)}. {Path(config.output)} has the output of each.")


if __name__ == "__main__":
    sys.exit(run_command(GpuCheckConfig, main, command="python -m benchmarks.gpu_check"))

"""A run as one page that people look at: how it went, what it learnt, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_pipeline.config import Config, ConfigError, Tree, read_yaml, run_command
from ssl_pipeline.eval.page.curves import curve, number
from ssl_pipeline.eval.page.evaluations import Report, evaluation_sections, read_reports
from ssl_pipeline.eval.page.html import curves, folded, page, paragraph, section, table_of
from ssl_pipeline.eval.page.metrics import MONITORED, Series, read_series
from ssl_pipeline.files import write_text
from ssl_pipeline.run.directory import read_status


class ReportConfig(Config):
    """A run as one self-contained page: its curves, monitors, settings and evaluations. It may still be training."""

    positional = "run"

    run: Path
    """The run's directory."""
    output: Path | None = None
    """The file that is written; by default report.html in the run."""


def report_page(run: Path) -> str:
    """The page, as HTML that loads nothing. Raises ConfigError for a directory in which nothing ran."""
    if not run.is_dir():
        raise ConfigError(f"run={run} must be the directory of a run. There is none.")
    series, reports, settings = read_series(run), read_reports(run), _settings(run)
    if not series and not reports:
        raise ConfigError(f"run={run} has neither metrics.jsonl nor a report in eval/: nothing ran there.")
    tree = read_yaml(settings, where=str(run / "config.yaml")) if settings else {}
    sections = [
        _about(run, tree if isinstance(tree, dict) else {}),
        *_monitors(series),
        *evaluation_sections(reports),
        section("Curves", curves([(one.title, curve(one)) for one in series if len(one.values) > 1])),
    ]
    if settings:
        sections.append(section("Settings", folded("config.yaml", settings)))
    return page(f"Run {run.resolve().name}", conclusion(series, reports), sections)


def conclusion(series: Sequence[Series], reports: Mapping[str, Report]) -> str:
    """One sentence: what the evaluation found, else the first monitor, else the loss."""
    for report in reports.values():
        against = {name: float(result["top1"]) for name, result in report["baselines"].items()}
        told = f"Top-1 accuracy {report['top1']:.2f} %"
        if "random" in against:
            told += f", {against['random']:.2f} % at random initialisation"
        if "raw_pixels" in against:
            told += f", {against['raw_pixels']:.2f} % with raw pixels"
        return f"{told}."
    for one in series:
        if one.name in MONITORED or one.name == "loss":
            start = f"{number(one.start)} at the start, " if one.start is not None else ""
            first = "" if start or one.name in MONITORED else f"{number(one.values[0])} at first, "
            if one.name == "loss" and any(other.name in MONITORED for other in series):
                continue
            return f"{one.title}: {start}{first}{number(one.values[-1])} at step {one.steps[-1]:,}."
    return "Nothing was measured yet."


def _settings(run: Path) -> str:
    try:
        return (run / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _about(run: Path, tree: Tree) -> str:
    """State, method, backbone, and where the weights come from."""
    status = read_status(run)
    backbone, method, data = (_section(tree, name) for name in ("backbone", "method", "data"))
    origin = backbone.get("weights")
    weights = f"{origin}" if origin else "random initialisation"
    if backbone.get("weights_from"):
        weights += f" ({backbone['weights_from']})"
    rows = [
        ["directory", str(run.resolve())],
        ["state", "-" if status is None else f"{status.state}, step {status.step:,}, {status.time}"],
        ["recipe", str(tree.get("recipe") or "-")],
        ["method", str(method.get("name", "-"))],
        ["backbone", str(backbone.get("name", "-"))],
        ["weights to begin with", weights if backbone else "-"],
        ["images", str(data.get("shards", "-"))],
    ]
    reason = [paragraph(status.reason, kind="warning")] if status is not None and status.reason else []
    return section("Run", *reason, table_of(["", ""], rows))


def _section(tree: Tree, name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _monitors(series: Sequence[Series]) -> list[str]:
    """Start, best and last figure of each monitor."""
    rows = []
    for one in series:
        if one.name in MONITORED:
            best = one.best()
            rows.append(
                [
                    one.title,
                    "-" if one.start is None else number(one.start),
                    "-" if best is None else f"{number(best[0])} (step {best[1]:,})",
                    f"{number(one.values[-1])} (step {one.steps[-1]:,})",
                ]
            )
    return [section("Monitors", table_of(["", "at the start", "best", "last"], rows))] if rows else []


def main(config: ReportConfig) -> None:
    path = config.output or config.run / "report.html"
    html = report_page(config.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    print(f"written to {path}")


def command(name: str = "python -m eval.report") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(ReportConfig, main, command=name)

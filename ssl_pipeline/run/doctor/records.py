"""What the doctor reads of a run's directory, and `doctor.json`, in which its findings are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_pipeline.config import RECIPES, ConfigError, Value, read_recipe, read_yaml
from ssl_pipeline.files import write_json
from ssl_pipeline.run.doctor import diagnose
from ssl_pipeline.run.doctor.case import Finding, Row

FINDINGS = "doctor.json"


def examine(run: Path) -> list[Finding]:
    """What is wrong with the run in a directory: what its rows say now, and what was found while it trained.

    Raises ConfigError if there is no run, or if it has logged nothing.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run} is not the directory of a run: it has no config.yaml. Give the output of pretrain.py."
        )
    settings, rows = settings_of(path.read_text(encoding="utf-8")), read_rows(run)
    if not rows:
        raise ConfigError(f"{run} has no row in metrics.jsonl yet. Rows come every train.log_every steps; try later.")
    found = diagnose(rows, settings, read_recipe_of(settings))
    now = {finding.rule for finding in found}
    earlier = [finding for finding in read_findings(run) if finding.rule not in now]
    return sorted([*earlier, *found], key=lambda finding: finding.step)


def read_rows(run: Path) -> list[Row]:
    """The rows of metrics.jsonl; incomplete lines (a run that was cut off, or still writes) are left out."""
    path = run / "metrics.jsonl"
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "epoch"} <= row.keys() and row.keys() & {"images", "position"}:
                rows.append(row)
        except ValueError:
            continue
    return rows


def settings_of(yaml_text: str) -> dict[str, Value]:
    """A config.yaml as a plain tree."""
    tree = read_yaml(yaml_text, where="config.yaml") if yaml_text else {}
    return tree if isinstance(tree, dict) else {}


def read_recipe_of(settings: Mapping[str, Value]) -> dict[str, Value] | None:
    """The recipe that settings come from, as its file is now; None if there is none."""
    name = settings.get("recipe")
    try:
        return read_recipe(str(name), RECIPES) if name else None
    except (ConfigError, OSError):  # renamed, or of a checkout that is no longer there
        return None


def read_findings(run: Path) -> list[Finding]:
    """What doctor.json holds; nothing if there is none, or if it is not one."""
    try:
        kept = json.loads((run / FINDINGS).read_text(encoding="utf-8"))["findings"]
        return [Finding(**{**finding, "settings": tuple(finding["settings"])}) for finding in kept]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def write_findings(run: Path, findings: Sequence[Finding]) -> None:
    kept = [finding.as_json() for finding in findings]
    write_json(run / FINDINGS, {"findings": kept}, durable=False)

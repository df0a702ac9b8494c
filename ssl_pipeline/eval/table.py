"""One table of what a run has learnt, from the files that eval.knn, eval.linear and eval.classifier have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config import Config, ConfigError, printable, run_command
from ssl_pipeline.eval.measures import format_table, percent

MODELS = {"raw_pixels": "raw pixels", "random": "random initialisation", "pretrained": "pretrained"}
EVALUATORS = {"knn": "k-NN top-1", "linear": "linear top-1", "classifier": "classifier top-1"}
WITH_BASELINES = ("knn", "linear")


class TableConfig(Config):
    """Raw pixels, random initialisation and the backbone of a run, or of whatever was measured there, under k-NN and
    linear probe; and the run's own classifier."""

    positional = "run"

    run: Path
    """The run's directory, after eval.knn and eval.linear with baselines=true."""


def read_top1(run: Path) -> dict[str, dict[str, float]]:
    """`{"knn": {"raw_pixels": percent, "random": ..., "pretrained": ...}, "linear": ...}`, as far as it was measured.

    Raises ConfigError if neither evaluator has run, or if a file is not an evaluator's.
    """
    top1 = {}
    for name in EVALUATORS:
        path = run / "eval" / f"{name}.json"
        if not path.is_file():
            continue
        try:
            report = json.loads(path.read_text())
            top1[name] = {model: float(result["top1"]) for model, result in report["baselines"].items()}
            top1[name]["pretrained"] = float(report["top1"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a report of eval.{name} ({error}). Run python -m eval.{name} again."
            ) from None
    if not top1:
        raise ConfigError(
            f"{run} has none of {', '.join(f'eval/{name}.json' for name in EVALUATORS)}. "
            f"Run first: python -m eval.knn run={run} train=SHARDS test=SHARDS baselines=true"
        )
    return top1


@dataclass(frozen=True)
class Subject:
    """The network that reports are about: what it is called, and where its weights come from (empty: not told)."""

    label: str = MODELS["pretrained"]
    weights: str = ""

    def __str__(self) -> str:
        return f"the {self.label} backbone" if self.label == MODELS["pretrained"] else self.label


def read_subject(run: Path) -> Subject:
    """What the reports in a directory are about; ConfigError if they are about different networks."""
    found: dict[str, tuple[dict[str, object], Subject]] = {}
    for name in EVALUATORS:
        path = run / "eval" / f"{name}.json"
        if path.is_file() and (read := _read_about(path, name)):
            found[name] = read
    first = next(iter(found), "")
    for name, (about, subject) in found.items():
        if about != found[first][0]:
            one, other = (f"{each.label} ({each.weights})" for each in (found[first][1], subject))
            raise ConfigError(
                f"{run}/eval/{first}.json and {name}.json are about different networks: {one}, and {other}. Run the "
                "evaluator again whose report is not about the network that you want."
            )
    return next((subject for _, subject in found.values()), Subject())


def _read_about(path: Path, name: str) -> tuple[dict[str, object], Subject] | None:
    """What tells the network of a report from others, wherever its run lies, and what it is called."""
    try:
        protocol = json.loads(path.read_text()).get("protocol", {})
        about = dict(protocol.get("subject", {}))
        if not about:
            return None
        of_a_run = about.pop("run", None) is not None
        label = protocol.get("label") or (MODELS["pretrained"] if of_a_run else about["backbone"]["name"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a report of eval.{name} ({error}). Run python -m eval.{name} again."
        ) from None
    return about, Subject(str(label), str(about.get("weights", "")))


def summary(top1: Mapping[str, Mapping[str, float]], subject: Subject = Subject()) -> str:
    """The table, where raw pixels are ahead, and how many times smaller the k-NN error became."""
    measured = {name: title for name, title in EVALUATORS.items() if name in top1}
    labels = MODELS | {"pretrained": subject.label}
    rows = [
        (label, *(percent(top1[name].get(model)) for name in measured))
        for model, label in labels.items()
        if model == "pretrained" or any(name in top1 for name in WITH_BASELINES)
    ]
    lines = [format_table(("", *measured.values()), rows), ""]
    lines += compare_with_raw_pixels(top1, subject)
    if "random" in top1.get("knn", {}):
        random, pretrained = (100.0 - top1["knn"][model] for model in ("random", "pretrained"))
        ratio = f"{random / pretrained:.1f} times smaller" if pretrained else "none is left"
        if 0 < random < pretrained:
            ratio = f"{pretrained / random:.1f} times larger"
        measured_one = f"{pretrained:.2f} % {subject.label}"
        lines.append(f"k-NN error: {random:.2f} % at random initialisation, {measured_one}: {ratio}.")
    if subject.weights:
        lines.append(f"{subject.label}: {subject.weights}")
    return "\n".join(lines)


def compare_with_raw_pixels(top1: Mapping[str, Mapping[str, float]], subject: Subject) -> list[str]:
    """One sentence per evaluator that raw pixels do not lose, and one for those that they do."""
    compared = [name for name in EVALUATORS if "raw_pixels" in top1.get(name, {})]
    if not any(name in top1 for name in WITH_BASELINES):
        return []
    if not compared:
        return ["No baselines were measured: run the evaluators with baselines=true."]
    lines, lost = [], []
    for name in compared:
        raw, pretrained = top1[name]["raw_pixels"], top1[name]["pretrained"]
        if raw < pretrained:
            lost.append(EVALUATORS[name])
        else:
            relation = "equal" if raw == pretrained else "beat"
            lines.append(
                f"Raw pixels {relation} {subject} in {EVALUATORS[name]}: {percent(raw)} against {percent(pretrained)}."
            )
    if lost:
        name = str(subject).replace("the ", "The ", 1) if subject.label == MODELS["pretrained"] else str(subject)
        lines.append(f"{name} is ahead of raw pixels in {' and '.join(lost)}.")
    return lines


def doubts(run: Path) -> list[str]:
    """Why the columns are not of the same images, and what each evaluator warned of: one sentence each."""
    protocols = {}
    for name in EVALUATORS:
        path = run / "eval" / f"{name}.json"
        if path.is_file():
            protocols[name] = json.loads(path.read_text()).get("protocol", {})
    said = dict.fromkeys(str(warning) for protocol in protocols.values() for warning in protocol.get("warnings", ()))
    compared = {
        name: " ".join(
            [f"train={protocol.get('train')} test={protocol.get('test')} size={protocol.get('size')}"]
            + ["leave_one_out=true"] * bool(protocol.get("leave_one_out"))
        )
        for name, protocol in protocols.items()
    }
    if len(set(compared.values())) > 1:
        each = "; ".join(f"{EVALUATORS[name]}: {settings}" for name, settings in compared.items())
        said[f"The columns are not of the same images and must not be compared: {each}."] = None
    return list(said)


def main(config: TableConfig) -> None:
    print(summary(read_top1(config.run), read_subject(config.run)))
    for doubt in doubts(config.run):
        print(printable(f"warning: {doubt}"))


def command(name: str = "python -m eval.table") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(TableConfig, main, command=name)

"""The README.md of an exported backbone: recipe, images, results, licences, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import yaml

from ssl_pipeline import __version__
from ssl_pipeline.backbones import BackboneOfRun
from ssl_pipeline.backbones.classifier import FILE_NAME as CLASSIFIER_FILE
from ssl_pipeline.backbones.weights import is_tag
from ssl_pipeline.config import printable, read_yaml
from ssl_pipeline.eval.measures import read_measures
from ssl_pipeline.eval.results import read_reports

CARD_FILE = "README.md"
BACKBONE_FILE = "backbone.safetensors"
NOT_STATED = "not stated"
LIBRARIES = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx"}
Format = Literal["timm", "huggingface", "onnx"]

LOADING = {
    "timm": """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # on the Hub: hf-hub:NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
""",
    "huggingface": """from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER").eval()
features = model(images).pooler_output  # timm reads the same folder: local-dir:FOLDER
""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(features,) = session.run(["features"], {"images": images})  # float32 (N, 3, H, W), normalised
""",
}


def model_card(
    run: Path, found: BackboneOfRun, *, format: Format, images_licence: str | None, weights_licence: str | None
) -> str:
    """The card as Markdown with the front matter that the Hub reads.

    images_licence, weights_licence: of the training images and of the weights that the run started from; the latter is
    taken from timm where it is None and the run began with weights of a timm tag.
    """
    settings, start = _settings(run), _first_start(run)
    source = settings.get("backbone", {}).get("weights")
    licences = {"images": images_licence or NOT_STATED}
    if source is not None:
        licences["starting weights"] = weights_licence or _licence_of_tag(found, str(source)) or NOT_STATED
    lines = [
        "---",
        yaml.safe_dump(_front_matter(format, settings), sort_keys=False).strip(),
        "---",
        f"# {found.backbone.config.name}, {_learnt(settings)}",
        "",
        f"Features ({found.backbone.embed_dim} numbers) of RGB images, by ssl-pipeline {__version__}.",
        *without_classifier(run),
        "",
        *_table("training", _training(run, found, settings, start)),
        *_table("images expected", _expected(found)),
        *_table("licence", licences),
        "The licence of the model itself is for whoever publishes it to state: set `license` above.",
        "",
        *_results(run, found),
        "## Loading",
        "",
        f"```python\n{LOADING[format]}```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(format: Format, settings: Mapping[str, Any]) -> dict[str, object]:
    method = settings.get("method", {}).get("name")
    return {
        "license": "unknown",
        "library_name": LIBRARIES[format],
        "pipeline_tag": "image-feature-extraction",
        "tags": list(dict.fromkeys(["ssl-pipeline", _kind(settings), *([str(method)] if method else [])])),
    }


def without_classifier(run: Path) -> list[str]:
    """The sentence that a classifier which the run has learnt is not exported; none where it has none."""
    if not (run / CLASSIFIER_FILE).is_file():
        return []
    return [f"The classifier that the run has learnt is not part of the export: {CLASSIFIER_FILE} of the run has it."]


def _kind(settings: Mapping[str, Any]) -> str:
    """What the Hub calls this kind of training."""
    if settings.get("method", {}).get("name") == "supervised":
        return "supervised"
    if (settings.get("data") or {}).get("labelled"):
        return "semi-supervised-learning"
    return "self-supervised-learning"


def _learnt(settings: Mapping[str, Any]) -> str:
    """How the backbone was trained, and from which weights on, as the title says it."""
    source = (settings.get("backbone") or {}).get("weights")
    kind = _kind(settings)
    if kind == "supervised":
        told = "fine-tuned with labels" if source else "trained with labels"
    else:
        told = "trained with few labels" if kind.startswith("semi") else "pretrained without labels"
    return f"{told}, starting from {_name(source)}" if source else told


def _name(place: object) -> str:
    """A tag as it is; of a path only the name, and the run's of a file that every run has."""
    told = str(place)
    if is_tag(told):
        return told
    path = Path(told)
    return f"{path.parent.name}/{path.name}" if path.name == BACKBONE_FILE and path.parent.name else path.name or told


def _training(
    run: Path, found: BackboneOfRun, settings: Mapping[str, Any], start: Mapping[str, Any]
) -> Iterator[tuple[str, object]]:
    method, data = settings.get("method", {}), start.get("data") or {}
    yield "recipe", _name(settings["recipe"]) if settings.get("recipe") else NOT_STATED
    yield "method", method.get("name", NOT_STATED)
    yield "network of the run", found.name or "the one that it exports"
    yield "run", run.resolve().name
    yield "optimizer steps", f"{found.step:,}" if found.step is not None else NOT_STATED
    yield "training images", f"{data['images']:,}" if isinstance(data.get("images"), int) else NOT_STATED
    if fingerprint := data.get("fingerprint"):
        yield "fingerprint of the images", str(fingerprint)[:16]
    labelled = start.get("labelled data") or {}
    if isinstance(labelled.get("images"), int):
        yield "additional labelled images", f"{labelled['images']:,}"
    source = settings.get("backbone", {}).get("weights")
    yield "started from", _name(source) if source else "random weights"
    yield "SHA-256 of the backbone in the run", found.sha256[:16]


def _expected(found: BackboneOfRun) -> Iterator[tuple[str, object]]:
    seen = found.preprocessing
    yield "size", f"{seen.size} x {seen.size} pixels"
    yield "mean", ", ".join(f"{value:g}" for value in seen.mean)
    yield "standard deviation", ", ".join(f"{value:g}" for value in seen.std)
    yield "values", "RGB / 255, less the mean, over the deviation"


def _results(run: Path, found: BackboneOfRun) -> list[str]:
    """What evaluators measured of exactly these weights; other weights of the run have other results."""
    rows = []
    for name, report in read_reports(run, picked=True).items():
        protocol = report["protocol"]
        if protocol.get("subject", {}).get("weights_sha256") != found.sha256:
            continue
        random = read_measures(report.get("baselines", {}).get("random", {}))
        images = " / ".join(f"{protocol[key]:,}" for key in ("num_train", "num_test") if key in protocol) or "-"
        for measure in read_measures(report).values():
            against = random[measure.name].cell() if measure.name in random else "-"
            rows.append(f"| eval.{name} | {measure.title} | {measure.cell()} | {against} | {images} |")
    if not rows:
        return ["The run has no evaluation of these weights (`python -m eval.suite run=...`).", ""]
    head = "| evaluator | figure | value | at random initialisation | training / test images |"
    return [head, "| --- | --- | --- | --- | --- |", *rows, ""]


def _table(title: str, rows: Mapping[str, object] | Iterator[tuple[str, object]]) -> list[str]:
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    cells = [f"| {name} | {printable(str(value)).replace('|', '/')} |" for name, value in pairs]
    return [f"| {title} | |", "| --- | --- |", *cells, ""]


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    tree = read_yaml(path.read_text(encoding="utf-8"), where=str(path)) if path.is_file() else None
    return tree if isinstance(tree, dict) else {}


def _first_start(run: Path) -> dict[str, Any]:
    """What run.json says about the first start; nothing if it is missing or not a start."""
    try:
        starts = json.loads((run / "run.json").read_bytes())
        return dict(starts["starts"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def _licence_of_tag(found: BackboneOfRun, tag: str) -> str | None:
    """What timm says about pretrained weights; None for a file or a run."""
    name = f"{found.backbone.config.name}.{tag}"
    known = is_tag(tag) and name in timm.list_pretrained(f"{found.backbone.config.name}.*")
    return getattr(timm.models.get_pretrained_cfg(name), "license", None) if known else None

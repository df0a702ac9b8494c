"""A backbone of any run, ended or not, as files for other programs: timm, Hugging Face transformers, ONNX."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ssl_pipeline.backbones import BackboneOfRun, load_run, save_backbone
from ssl_pipeline.config import Config, ConfigError, printable, run_command
from ssl_pipeline.config.output_file import Folder, require_writable
from ssl_pipeline.eval.exports.model_card import CARD_FILE, model_card, without_classifier
from ssl_pipeline.eval.exports.onnx_graph import MODEL_FILE, require_onnx, write_graph
from ssl_pipeline.eval.exports.plain import require_own_features
from ssl_pipeline.eval.exports.timm_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    compare_with_timm,
    compare_with_transformers,
    require_timm,
    write_folder,
)
from ssl_pipeline.files import write_text

FILES = {
    "backbone": ("backbone.safetensors", "backbone.json"),
    "timm": (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE),
    "huggingface": (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE),
    "onnx": (MODEL_FILE, CARD_FILE),
}


class ExportConfig(Config):
    """Write a backbone of a run for other programs.

    format=backbone writes the two files that a run leaves at its end. The others add a model card (README.md), are
    read again by the program they are for, and compared with the backbone on a batch before anything appears in output.
    """

    positional = "run"

    run: Path
    """The run's directory; it may still be training."""
    step: Annotated[int, Field(gt=0)] | None = None
    """The step to take, exported or in a checkpoint, instead of the newest."""
    which: str | None = None
    """A backbone of its checkpoints by name, `student` or `teacher`, instead of the one that it exports."""
    format: Literal["backbone", "timm", "huggingface", "onnx"] = "backbone"
    """`backbone`: backbone.safetensors and backbone.json; `timm`: a folder for timm.create_model("local-dir:...");
    `huggingface`: the same for transformers' AutoModel; `onnx`: model.onnx."""
    images_licence: str | None = None
    """For the model card: the licence of the training images."""
    weights_licence: str | None = None
    """For the model card: the licence of the weights that the run started from; timm's own are known."""
    output: Folder
    """Directory for the files."""

    @model_validator(mode="after")
    def _a_card_for_the_licences(self) -> ExportConfig:
        if self.format == "backbone" and (self.images_licence or self.weights_licence):
            raise ValueError(
                "images_licence and weights_licence go into a model card, which format=backbone does not write."
            )
        return self


def export(config: ExportConfig) -> None:
    """Write the files; ConfigError if there are some already, RunError if a reader computes something else."""
    there = [name for name in FILES[config.format] if (config.output / name).exists()]
    if there:
        raise ConfigError(f"output={config.output} has a {there[0]} already. Choose another directory, or remove it.")
    require_writable(config.output, key=f"output={config.output}")
    if config.format == "onnx":
        require_onnx()
    found = load_run(config.run, which=config.which, step=config.step)
    told = _write(config, found)
    of_step = "" if found.step is None else f" of step {found.step}"
    print(f"Written to {config.output}: {found.name or 'the exported backbone'}{of_step} of {config.run}.")
    for line in [*told, *without_classifier(config.run)]:
        print(printable(line))


def _write(config: ExportConfig, found: BackboneOfRun) -> list[str]:
    """The files of the format, all or none; returns what to say about them."""
    if config.format == "backbone":
        save_backbone(config.output, found.backbone, found.preprocessing, step=found.step)
        return []
    require_own_features(found)
    told = []
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output, prefix=".export-") as place:
        folder = Path(place)
        if config.format == "onnx":
            told.append(write_graph(folder, found))
        else:
            require_timm(found)
            write_folder(folder, found, for_transformers=config.format == "huggingface")
            told.append(compare_with_timm(folder, found))
            if config.format == "huggingface":
                told += compare_with_transformers(folder, found)
        card = model_card(
            config.run,
            found,
            format=config.format,
            images_licence=config.images_licence,
            weights_licence=config.weights_licence,
        )
        write_text(folder / CARD_FILE, card.replace("FOLDER", config.output.resolve().name))
        for path in sorted(folder.iterdir()):
            shutil.move(path, config.output / path.name)
    return told


def command(name: str = "python -m eval.export") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(ExportConfig, export, command=name)

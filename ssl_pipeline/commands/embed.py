"""Features of images as a table: a row for each, with its key and its file, for any other program."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssl_pipeline.config import PlaceText, printable, run_command
from ssl_pipeline.config.output_file import OutputFile
from ssl_pipeline.data_tools.features import PassChoice, engine_pass
from ssl_pipeline.distributed import process_group, rank, wait_for_all
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import open_model
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.features.rows import write_csv, write_npz, write_parquet
from ssl_pipeline.eval.images import place_of
from ssl_pipeline.eval.labelled import look_at_first
from ssl_pipeline.packing.images_as_shards import open_source

WRITERS = {".csv": write_csv, ".parquet": write_parquet, ".npz": write_npz}


class EmbedConfig(PassChoice, OutputFile):
    """Features of images by a run's backbone or a timm model, a row for each image, as a file.

    `file` is the name of the image's file, `key` the name of its sample in the shards. The function ssl_pipeline.embed
    gives `file` for a folder or zip, and `key` for shards.
    """

    suffixes = (".csv", ".parquet", ".npz")

    source: PlaceText
    """A folder or zip of images, or one image, packed once into RUN/eval/images, without a run in the user's cache; or
    shards."""
    output: Path
    """The file that is written: FILE.csv, FILE.parquet or FILE.npz."""
    kind: Literal["pooled", "class", "blocks"] = "pooled"
    """What is kept of each image: `pooled` is what the evaluators measure, `class` the class token of a ViT, `blocks`
    the class tokens of its last blocks, one after the other."""
    last_blocks: Annotated[int, Field(gt=0)] = 4
    """How many blocks `kind=blocks` takes."""


def embed(config: EmbedConfig) -> None:
    """Write the file; with the processes of torchrun each computes a share of the images."""
    config.begin_output()
    model = open_model(config)
    network = FeatureKinds(model.backbone, (config.kind,), last_blocks=config.last_blocks)
    shards, index = open_source(config.source, place_of(config.source, config.run))
    look_at_first(index, model.preprocessing.size)
    passes = config.output.with_name(f".{config.output.name}.features")  # until they are in the file
    with process_group(), _removed(passes, kept_if_unfinished=config.engine == "ray"):
        if rank() == 0:
            print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)
        stored = engine_pass(passes, model, network, index, config, shards=shards, description=model.label)
        wait_for_all(choose_device(config.device))  # they have opened the files that the first deletes
        if rank() == 0:
            features_ND = stored.features[config.kind]
            WRITERS[config.output.suffix](config.output, index, features_ND, stored.labels)
            rows = f"{len(index):,} row{'s' * (len(index) != 1)} of {features_ND.shape[1]} features"
            join = "key" if shards == config.source else "file"
            print(
                printable(f"{rows} written to {config.output}; ssl_pipeline.embed names its rows by the column {join}")
            )


@contextmanager
def _removed(folder: Path, *, kept_if_unfinished: bool) -> Iterator[None]:
    """The first process removes the folder at the end; or only on success, so that the next call can resume."""
    reached = False
    try:
        yield
        reached = True
    finally:
        if rank() == 0 and (reached or not kept_if_unfinished):
            shutil.rmtree(folder, ignore_errors=True)


def command(name: str = "python -m eval.embed") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(EmbedConfig, embed, command=name, shared=True)

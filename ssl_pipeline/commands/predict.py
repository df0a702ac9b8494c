"""Labels and probabilities of images by a run's own classifier as a table: a row for each, with its key and its file.

It is here because it packs a folder of images as pretraining does.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ssl_pipeline.config import PlaceText, printable, run_command
from ssl_pipeline.config.output_file import OutputFile
from ssl_pipeline.eval.features.classes import RunClassifierConfig, class_probabilities, open_classifier
from ssl_pipeline.eval.features.rows import names_of
from ssl_pipeline.eval.images import place_of
from ssl_pipeline.eval.labelled import look_at_first
from ssl_pipeline.files import written_whole
from ssl_pipeline.packing.images_as_shards import open_source

Row = tuple[str | int | float | None, ...]
WriteRows = Callable[[Sequence[Row]], None]


class PredictConfig(RunClassifierConfig, OutputFile):
    """Labels and probabilities of images by the classifier that a run has learnt, a row for each image, as a file."""

    suffixes = (".csv", ".parquet")

    source: PlaceText
    """A folder or zip of images, or one image, packed once into RUN/eval/images; or shards."""
    output: Path
    """The file that is written: FILE.csv or FILE.parquet."""


def predict(config: PredictConfig) -> None:
    """Write the file: key, sample_id, file; label, name and probability of the guess; the probability of each class.

    `label` is the guessed class by its number, `name` what it is called, if the run knew that. `file` is what the image
    was made from, if that is known. The file is written completely or not at all.
    """
    config.begin_output()
    opened = open_classifier(config)
    _, index = open_source(config.source, place_of(config.source, config.run))
    look_at_first(index, opened.preprocessing.size)
    print(printable(f"{opened.label}: {opened.about['weights']}"), flush=True)
    columns = ("key", "sample_id", "file", "label", "name", "probability", *_columns(opened.names_beside(None)))
    named, done = names_of(index), 0
    with written_whole(config.output) as aside, WRITERS[config.output.suffix](aside, columns) as write:
        for probabilities_BC in class_probabilities(opened, index, config, description=opened.label):
            confidence_B, guesses_B = (part.tolist() for part in probabilities_BC.max(dim=1))
            rows: list[Row] = []
            for number, of_class in enumerate(probabilities_BC.tolist()):
                key, file = next(named)
                name = None if opened.class_names is None else opened.class_names[guesses_B[number]]
                rows.append((key, done + number, file, guesses_B[number], name, confidence_B[number], *of_class))
            write(rows)
            done += len(rows)
    print(printable(f"{done:,} rows of {opened.num_classes} classes written to {config.output}"))


def _columns(names: Sequence[str]) -> list[str]:
    """`probability_NAME` of each class, by numbers where two have one name."""
    told_apart = names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]
    return [f"probability_{name}" for name in told_apart]


@contextmanager
def _csv(path: Path, columns: Sequence[str]) -> Iterator[WriteRows]:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        yield writer.writerows


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[WriteRows]:
    import pyarrow as pa
    from pyarrow import parquet

    own = {
        "key": pa.string(),
        "sample_id": pa.int64(),
        "file": pa.string(),
        "label": pa.int64(),
        "name": pa.string(),
    }
    schema = pa.schema([(column, own.get(column, pa.float32())) for column in columns])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(rows: Sequence[Row]) -> None:
            arrays = [
                pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        yield write


WRITERS: dict[str, Callable[[Path, Sequence[str]], AbstractContextManager[WriteRows]]] = {
    ".csv": _csv,
    ".parquet": _parquet,
}


def command(name: str = "python -m eval.predict") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(PredictConfig, predict, command=name)

"""Labels of images in a CSV file: columns `file` and `label`, a row per image."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.packing.candidates import path_parts

COLUMNS = ("file", "label")


@dataclass(frozen=True)
class LabelTable:
    """The label of each file, and the names of all classes that the table has; a label is a place among these."""

    labels: dict[str, int]
    class_names: list[str]

    def below(self, prefix: str) -> dict[str, int]:
        """The labels of files below a folder, by what follows it. Files may also be named from there on."""
        start = "".join(f"{part}/" for part in path_parts(prefix))
        inside = {name.removeprefix(start): label for name, label in self.labels.items() if name.startswith(start)}
        return self.labels | inside


def read_label_table(path: Path) -> LabelTable:
    """The table in a CSV file; an image whose label is empty has none.

    A label is the name of a class. Classes are sorted, by number if all are whole numbers: the labels 0 to C-1 keep
    their numbers. They are those of the whole file, so that parts of one data set agree. Raises DataError for a file
    that cannot be read, lacks a column, or gives one image two labels.
    """
    texts = dict[str, str]()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                found = ",".join(reader.fieldnames or ()) or "nothing"
                raise DataError(f"labels={path} needs the columns file,label in its first line. It has {found[:100]}.")
            for row in reader:
                name = "/".join(path_parts((row["file"] or "").replace("\\", "/")))
                text = (row["label"] or "").strip()
                if texts.setdefault(name, text) != text:
                    raise DataError(
                        f"labels={path}, line {reader.line_num}: '{name}' has the label '{text}', and "
                        f"'{texts[name]}' above. Keep one."
                    )
    except OSError as error:
        raise DataError(f"labels={path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"labels={path} is not a CSV file in UTF-8: {error}.") from None
    names = set(texts.values()) - {""}
    if not names:
        raise DataError(f"labels={path} holds no label.")
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    class_names = sorted(names, key=lambda name: (int(name), name)) if are_numbers else sorted(names)
    label_of = {name: label for label, name in enumerate(class_names)}
    return LabelTable({name: label_of[text] for name, text in texts.items() if text}, class_names)

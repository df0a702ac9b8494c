"""The images of a source and their classes, by the names of files and folders, or by a table of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssl_pipeline.packing.conversion import OPTIONAL, extension_of, is_image_name, is_read
from ssl_pipeline.packing.sources import Rejected, Source

TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
"""What the folders of the two parts of a data set are called."""
SPLITS = {*TRAIN, *TEST}
NO_IMAGE = "no image file"
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".7z", ".rar", ".parquet")
OTHER_FORMATS = ("jp2", "jxl", "ppm")
WITH_EXTRA = "not read here: .{}; pip install 'ssl-pipeline[heif]' brings the reader"


@dataclass(frozen=True)
class Candidate:
    """A file of the source that looks like an image, and its class; None without one."""

    name: str
    label: int | None


@dataclass(frozen=True)
class Candidates:
    """The image files of a source, the names of their classes (None without labels), and what is not an image file."""

    images: list[Candidate]
    class_names: list[str] | None
    others: list[Rejected]


def find_candidates(source: Source, *, labels: str | None = None) -> Candidates:
    """The images of a source; with `labels` "folders" the top folders are classes, with "none" none are.

    Without `labels` they are classes too, but for one that holds everything, as in most zips: then those below it are.
    Classes are sorted, those of empty folders among them. An image outside the class folders is kept, without
    a label; where there are no folders, no image has one.
    """
    images, others = _image_files(source)
    if labels == "none" or all(len(parts) == 1 for parts in images.values()):
        return Candidates([Candidate(name, None) for name in images], None, others)
    at = 0 if labels == "folders" else _depth_of_classes(list(images.values()))
    folders = [parts for parts in map(path_parts, source.folders()) if len(parts) > at and not _is_hidden(parts)]
    named = [parts for parts in images.values() if len(parts) > at + 1]
    class_names = sorted({parts[at] for parts in (*named, *folders)})
    label_of = {name: label for label, name in enumerate(class_names)}
    candidates = [
        Candidate(name, label_of[parts[at]] if len(parts) > at + 1 else None) for name, parts in images.items()
    ]
    return Candidates(candidates, class_names, others)


def label_candidates(source: Source, labels: Mapping[str, int], class_names: Sequence[str]) -> Candidates:
    """The images of a source with the labels that a table has for their names; those that it lacks have none."""
    images, others = _image_files(source)
    candidates = [Candidate(name, labels.get("/".join(parts))) for name, parts in images.items()]
    return Candidates(candidates, list(class_names), others)


def no_images(key: str, source: str, found: Candidates) -> str:
    """What to say about a source without an image file; key: the setting that names it."""
    archives = [other.file for other in found.others if other.file.lower().endswith(ARCHIVES)]
    if archives:
        one = f", or set {key}={source}/{archives[0]}" if archives[0].lower().endswith(".zip") else ""
        named = archives[0] if len(archives) == 1 else f"{archives[0]}, ..."
        return (
            f"{key}='{source}' has no image file, only archives, which are not opened ({len(archives):,}: "
            f"{named}). Unpack them into the folder{one}."
        )
    reasons = Counter(other.reason for other in found.others).most_common(1)
    most = f": {reasons[0][0]} ({reasons[0][1]:,})" if reasons and reasons[0][0] != NO_IMAGE else ""
    return (
        f"{key}='{source}' has no image file (.jpg .png .webp .gif .bmp .tif) among {len(found.others):,} files{most}."
    )


def parts_of_a_set(found: Candidates) -> list[str]:
    """The folders that would be classes, where these are parts of a data set (train, test and the like) and no classes;
    a part for training first.
    """
    names = found.class_names or ()
    used = {names[image.label]: path_parts(image.name) for image in found.images if image.label is not None}
    if not SPLITS.issuperset(name.lower() for name in used):
        return []
    first = sorted(used, key=lambda name: (not name.lower().startswith("train"), name))
    return ["/".join(used[name][: used[name].index(name) + 1]) for name in first]


def path_parts(name: str) -> list[str]:
    """Folders and file of a name; `/`, `.` and `..` only navigate and are not part of it."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def _image_files(source: Source) -> tuple[dict[str, list[str]], list[Rejected]]:
    """Files that are images by their names, with the parts of these, and the others with the reason."""
    images, others = dict[str, list[str]](), list(source.left_out())
    for name in source.names():
        parts = path_parts(name)
        extension = extension_of(parts[-1]) if parts else ""
        if not parts or _is_hidden(parts):
            others.append(Rejected(name, "hidden file"))
        elif extension in OPTIONAL and not is_read(extension):
            others.append(Rejected(name, WITH_EXTRA.format(extension)))
        elif extension in OTHER_FORMATS:
            others.append(Rejected(name, f"a format that is not read: .{extension}"))
        elif not is_image_name(parts[-1]):
            others.append(Rejected(name, NO_IMAGE))
        else:
            images[name] = parts
    return images, others


def _depth_of_classes(files: Sequence[Sequence[str]]) -> int:
    """How many folders, each alone in the one before it and without images of its own, hold everything; 0 unless there
    are several folders below them.
    """
    depth = 0
    while all(len(parts) > depth + 1 for parts in files):
        if len({parts[depth] for parts in files}) > 1:
            return depth
        depth += 1
    return 0


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)

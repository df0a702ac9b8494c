"""What deduplicate and curate have in common: images of shards with their features, a keep file, a contact sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import Tensor

from ssl_pipeline.config import printable
from ssl_pipeline.config.output_file import OutputFile
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.subset import open_subset, write_keep
from ssl_pipeline.data_tools.features import PassChoice, engine_pass
from ssl_pipeline.distributed import rank
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import EvaluatedModel, open_model
from ssl_pipeline.eval.features.passes import features_in_memory
from ssl_pipeline.eval.labelled import look_at_first
from ssl_pipeline.eval.page.html import page, paragraph, picture, pictures, section
from ssl_pipeline.eval.page.pictures import thumbnail
from ssl_pipeline.files import JSON, write_text

MOST_SHOWN = 16  # pictures of one group


class CurationConfig(PassChoice, OutputFile):
    """Shards, a model that measures similarity, and the file to write."""

    suffixes = (".npy",)

    shards: str
    """The images to choose from: shards as data.shards takes them."""
    keep: Path | None = None
    """FILE.npy of an earlier choice: only its images are looked at, and may stay."""
    output: Path
    """FILE.npy for data.keep; FILE.json next to it has the counts, FILE.html shows some of the choice."""
    cache: Path | None = None
    """Where features are kept for the next call: by default RUN/eval/cache, or FILE.features next to the output."""
    shown: int = Field(100, ge=0, le=2000)
    """Groups of pictures in FILE.html; 0 leaves it out."""

    @property
    def cache_directory(self) -> Path:
        return self.cache or (self.output.with_suffix(".features") if self.run is None else self.run / "eval" / "cache")


def open_images(config: CurationConfig) -> tuple[ShardIndex, EvaluatedModel]:
    """The images and the model; refuses up front what would fail at the end."""
    config.begin_output()
    index = open_subset(config.shards, keep=config.keep)
    if not len(index):
        raise DataError(f"shards={config.shards} has no images.")
    model = open_model(config)
    look_at_first(index, model.preprocessing.size)
    return index, model


def open_others(shards: str, key: str) -> ShardIndex:
    """Further images to compare with."""
    index = open_shards(shards)
    if not len(index):
        raise DataError(f"{key}={shards} has no images.")
    return index


def features_of(
    index: ShardIndex, model: EvaluatedModel, config: CurationConfig, what: str, *, shards: str | None
) -> Tensor:
    """Features (N, D) of the images of `shards`, memory-mapped; computed the first time, by all processes.

    Those of images without a place (shards=None) are computed only by this process, in memory.
    """
    if shards is not None:
        network, place = FeatureKinds(model.backbone), config.cache_directory
        keep = config.keep if shards == config.shards else None
        found = engine_pass(place, model, network, index, config, shards=shards, keep=keep, description=what)
        return found.features["pooled"]
    return features_in_memory(config, model, index, description=what)


@dataclass(frozen=True)
class Picture:
    """One image of a group on the contact sheet."""

    index: ShardIndex
    sample: int
    caption: str
    kind: str = ""


@dataclass(frozen=True)
class Shown:
    """A group of pictures side by side, under a heading."""

    heading: str
    pictures: Sequence[Picture]


def write_choice(
    config: CurationConfig,
    index: ShardIndex,
    chosen: Sequence[int],
    *,
    lead: str,
    counts: dict[str, JSON],
    groups: Iterable[Shown],
    command: str,
) -> None:
    """The keep file with its counts, and the contact sheet; prints what was done."""
    settings = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    origin: dict[str, JSON] = {"command": command, "settings": settings, "counts": counts}
    write_keep(config.output, index, chosen, origin=origin)
    print(printable(lead))
    written = [config.output, config.output.with_suffix(".json")]
    if config.shown:
        sheet = config.output.with_suffix(".html")
        parts = [section(group.heading, _row(group.pictures)) for group in groups]
        parts = parts or [section("Images", paragraph("Nothing to show."))]
        write_text(
            sheet, page(f"{command} {config.output.name}", "", lead, (), parts, foot=f"data.keep={config.output}")
        )
        written.append(sheet)
    print(printable(f"written: {', '.join(map(str, written))}"))
    print(printable(f"use: data.shards={config.shards} data.keep={config.output}"))


def _row(group: Sequence[Picture]) -> str:
    shown = group[:MOST_SHOWN]
    figures = [picture(thumbnail(one.index, one.sample), one.caption, kind=one.kind) for one in shown]
    more = paragraph(f"and {len(group) - len(shown):,} more") if len(group) > len(shown) else ""
    return pictures(figures) + more


def name_of(index: ShardIndex, sample: int) -> str:
    """What an image was made from, or its key."""
    return index.origin(sample) or index.key(sample)


def say(text: str) -> None:
    """Print on the first process."""
    if rank() == 0:
        print(printable(text), flush=True)

"""What a run's method sees, and what it reconstructs: the views of the run's own augmentation, reconstructions.

The method is built from the run's config.yaml, and its weights are those of the newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.backbones.patches import patchify, unpatchify
from ssl_pipeline.batch import Batch
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import validate
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.labelled import open_labelled_images, open_labelled_stream
from ssl_pipeline.data.stream import open_images, open_stream
from ssl_pipeline.eval.features.extract import eval_mode
from ssl_pipeline.eval.page.html import Section, about, heading, picture, pictures, rows_of, section
from ssl_pipeline.eval.page.pictures import as_pixels, at_least, data_url, thumbnail
from ssl_pipeline.eval.page.record import Record
from ssl_pipeline.eval.report import shown
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.training.batches import read_groups

IMAGES, SIDE = 6, 96  # how many images, and the side of what is shown in pixels, at least
GREY = 128.0  # of patches that are masked

# Axes: V views of each of B images, N = V * B, L patches, S pixels.


@dataclass(frozen=True)
class Seen:
    """A method with the first images of its run, as it saw them."""

    config: PretrainConfig
    method: Method
    batch: Batch
    images: list[str]
    """As stored, as data URLs; those of the labelled batch come last."""


def method_sections(record: Record) -> list[Section]:
    """The views, and reconstructions if the method makes them; nothing where the settings are unknown."""
    if not record.text:
        return []
    seen: list[Seen] = []

    def views() -> Section:
        seen.append(look(record))
        return views_section(seen[0])

    found = [shown("Views", views)]
    if seen and type(seen[0].method).reconstruct is not Method.reconstruct:
        found.append(shown("Reconstructions", lambda: reconstructions_section(record, seen[0])))
    return [part for part in found if part is not None]


def look(record: Record) -> Seen:
    """Build the method and read the images of its first step; ConfigError or DataError where that is not possible."""
    config = validate(PretrainConfig, record.settings)
    backbone = create_backbone(config.backbone.model_copy(update={"weights": None, "weights_from": None}))
    method = build_method(config.method, backbone)
    batch, images = first_batch(config, method)
    return Seen(config, method, batch, images)


def first_batch(config: PretrainConfig, method: Method) -> tuple[Batch, list[str]]:
    """The first IMAGES images of the run's order, cropped, coloured and masked as in its first step; and as stored."""
    few = {"cache": False, "crop_on": "worker", "workers": 0}
    data = config.data.model_copy(update={"batch_size": IMAGES, **few})
    groups, masks = read_groups(method, config.augment, labelled=False)
    index = open_images(data)
    stream = open_stream(
        index, groups, data, seed=config.seed, position=0, rank=0, world_size=1, masks=masks, repeat=True
    )
    images = next(stream).clone()
    stored = [thumbnail(index, sample) for sample in images.sample_ids.tolist()]
    labelled_index = open_labelled_images(data)
    if labelled_index is not None and data.labelled is not None:
        labelled = data.labelled.model_copy(update={"batch_size": IMAGES})
        of_labelled, masks = read_groups(method, config.augment, labelled=True)
        images.labelled = next(
            open_labelled_stream(
                labelled_index,
                of_labelled,
                data.model_copy(update={"labelled": labelled}),
                seed=config.seed,
                step=0,
                rank=0,
                world_size=1,
                accumulate=1,
                masks=masks,
            )
        ).clone()
        stored += [thumbnail(labelled_index, sample) for sample in images.labelled.sample_ids.tolist()]
    return make_batch(images.to("cpu"), config.augment, mean=data.mean, std=data.std), stored


def views_section(seen: Seen) -> Section:
    """A row for each image, its views by group."""
    parts = [
        about(
            "The first images of the run (left) and what the method sees of them. Are they still recognisable, and "
            "do the views of one image share what matters? Gray squares are patches that are masked."
        )
    ]
    originals = iter(seen.images)
    for batch in filter(None, (seen.batch, seen.batch.labelled)):
        if batch is seen.batch.labelled:
            parts.append(heading("Labelled images"))
        captioned = [
            (f"{name} {view + 1}" if len(views_VBCHW) > 1 else name, _as_shown(seen, name, views_VBCHW, batch)[view])
            for name, views_VBCHW in batch.views.items()
            for view in range(len(views_VBCHW))
        ]
        rows = [
            pictures(
                [
                    picture(next(originals), "image", kind="query"),
                    *(picture(data_url(at_least(views[image], SIDE)), caption) for caption, views in captioned),
                ]
            )
            for image in range(len(batch.sample_ids))
        ]
        parts.append(rows_of(rows))
    return section("Views", *parts)


def _as_shown(seen: Seen, name: str, views_VBCHW: Tensor, batch: Batch) -> Tensor:
    """(V, B, 3, S, S) in [0, 255], masked patches gray."""
    group, data = seen.config.augment[name], seen.config.data
    pixels = as_pixels(views_VBCHW, group.mean or data.mean, group.std or data.std)
    if name not in batch.masks:
        return pixels
    rule = next(needed.mask for needed in seen.method.needs if needed.name == name)
    assert rule is not None
    return with_grey(pixels.flatten(0, 1), batch.masks[name].flatten(0, 1), rule.patch_size).unflatten(
        0, pixels.shape[:2]
    )


def with_grey(pixels_NCHW: Tensor, masks_NL: Tensor, patch_size: int) -> Tensor:
    """Images whose masked patches are gray."""
    patches_NLD = patchify(pixels_NCHW, patch_size).masked_fill(masks_NL[..., None], GREY)
    grid = (pixels_NCHW.shape[-2] // patch_size, pixels_NCHW.shape[-1] // patch_size)
    return unpatchify(patches_NLD, patch_size, grid=grid)


def reconstructions_section(record: Record, seen: Seen) -> Section:
    """The method's reconstructions of its own views, by its newest checkpoint."""
    saved = Checkpoints(record.path / "checkpoints").load_latest(files=["method"])
    if saved is None:
        raise ValueError("it comes with the run's first checkpoint.")
    seen.method.load_state_dict(saved.tensors["method"])
    with torch.no_grad(), eval_mode(seen.method):
        painted_NCHW = seen.method.reconstruct(seen.batch)
    assert painted_NCHW is not None
    (name, *_), data = seen.batch.views, seen.config.data
    group, views_VBCHW = seen.config.augment[name], seen.batch.views[name]
    mean, std = group.mean or data.mean, group.std or data.std
    masked_NCHW = _as_shown(seen, name, views_VBCHW, seen.batch).flatten(0, 1)
    columns = {
        "seen": masked_NCHW,
        "painted": as_pixels(painted_NCHW, mean, std),
        "image": as_pixels(views_VBCHW.flatten(0, 1), mean, std),
    }
    if name not in seen.batch.masks:
        del columns["seen"]
    rows = [
        pictures(
            [picture(data_url(at_least(images_NCHW[number], SIDE)), title) for title, images_NCHW in columns.items()],
            kind="large",
        )
        for number in range(len(painted_NCHW))
    ]
    words = (
        f"What the network sees, what it reconstructs at step {saved.state.step:,}, and the image itself. Colours and "
        "large shapes come first; what stays blurred cannot be guessed from the rest."
    )
    return section("Reconstructions", about(words), rows_of(rows))

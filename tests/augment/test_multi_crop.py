"""MultiCrop: a run's views in somebody's own loop."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD, MultiCrop
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream
from tests.tiny import write_shards

GROUPS = {
    "global": ViewGroup(count=2, size=8, blur_prob=(1.0, 0.1)),
    "local": ViewGroup(count=3, size=6, scale=(0.05, 0.4), interpolation="bilinear"),
}


def images(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, 20 + n, 30 - n), dtype=torch.uint8, generator=generator) for n in range(count)]


def test_views_have_the_shapes_of_their_groups():
    views = MultiCrop(GROUPS)(images(), range(4), epoch=0)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "global": (2, 4, 3, 8, 8),
        "local": (3, 4, 3, 6, 6),
    }
    assert all(view.dtype == torch.float32 for view in views.values())


def test_they_depend_on_seed_epoch_and_id_alone():
    multi_crop = MultiCrop(GROUPS, seed=1)
    four = multi_crop(images(), [7, 3, 5, 9], epoch=2)
    torch.manual_seed(99)
    alone = multi_crop(images()[2:3], torch.tensor([5]), epoch=2)
    for name in GROUPS:
        torch.testing.assert_close(alone[name][:, 0], four[name][:, 2])
        for other in (MultiCrop(GROUPS, seed=2)(images(), [7, 3, 5, 9], epoch=2),
                      multi_crop(images(), [7, 3, 5, 9], epoch=3),
                      multi_crop(images(), [8, 4, 6, 1], epoch=2)):  # fmt: skip
            assert not torch.equal(other[name], four[name])


def test_they_are_the_views_of_a_run(tmp_path):
    index = open_shards(write_shards(tmp_path / "shards"))
    config = DataConfig(shards=str(tmp_path / "shards"), batch_size=6, workers=0)
    stream = open_stream(index, GROUPS, config, seed=4, position=0, rank=0, world_size=1)
    batch = make_batch(next(stream), GROUPS, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    decoded = [torch.from_numpy(decode_image(index.read(n).image)).permute(2, 0, 1) for n in batch.sample_ids.tolist()]
    views = MultiCrop(GROUPS, seed=4)(decoded, batch.sample_ids, epoch=0)
    assert views.keys() == batch.views.keys()
    for name in GROUPS:
        torch.testing.assert_close(views[name], batch.views[name])


def test_without_any_change_a_view_is_its_image_normalised():
    group = ViewGroup(
        count=1,
        size=8,
        scale=(1.0, 1.0),
        aspect=(1.0, 1.0),
        flip_prob=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob=0.0,
    )
    batch = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    views = MultiCrop({"view": group})(batch, range(2), epoch=0)["view"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(views[0], (batch / 255 - mean) / std)


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"needs images of 8 bits \(3, H, W\) on the CPU"):
        MultiCrop(GROUPS)([image], [0], epoch=0)


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="Got 4 images and 3 ids"):
        MultiCrop(GROUPS)(images(), range(3), epoch=0)
    with pytest.raises(ConfigError, match=r"one size\. Got x with \(8, 16\)"):
        MultiCrop({"x": ViewGroup(count=1, size=(8, 16))})

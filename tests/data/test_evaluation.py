from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ssl_pipeline.augment.central_crop import central_crop
from ssl_pipeline.data.evaluation import EvaluationSet, evaluation_batches
from ssl_pipeline.data.shards.open import DataError, open_shards


def smooth(height: int, width: int) -> np.ndarray:
    """Waves of a few pixels' length: resizing changes them visibly, without the clipping that noise would meet."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + number) * np.cos(columns / 7 - number) for number in range(3)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (511, 300), (200, 90), (256, 256)])
def test_large_views_are_cut_from_256_224ths(height: int, width: int) -> None:
    pixels = smooth(height, width)
    view = central_crop(torch.from_numpy(pixels), 224)
    scale = 256 / min(height, width)
    scaled = (256, int(scale * height)) if width < height else (int(scale * width), 256)
    resized = Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)
    assert view.shape == (3, 224, 224)
    assert view.is_contiguous()
    assert np.abs(view.numpy().astype(int) - expected).max() <= 1


def test_small_views_are_the_whole_shorter_side() -> None:
    pixels = smooth(32, 48)
    assert torch.equal(central_crop(torch.from_numpy(pixels), 32), torch.from_numpy(pixels[:, 8:40]).permute(2, 0, 1))
    halved = np.asarray(Image.fromarray(smooth(64, 64)).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(central_crop(torch.from_numpy(smooth(64, 64)), 32).numpy().astype(int) - halved).max() <= 1


def test_bilinear_views_are_pillows() -> None:
    pixels = smooth(64, 64)
    halved = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    view = central_crop(torch.from_numpy(pixels), 32, "bilinear")
    assert np.abs(view.numpy().astype(int) - halved).max() <= 1
    assert not torch.equal(view, central_crop(torch.from_numpy(pixels), 32))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200_000), (200_000, 1), (3, 1000)])
def test_any_shape_gives_a_view(height: int, width: int) -> None:
    assert central_crop(torch.full((height, width, 3), 7, dtype=torch.uint8), 8).eq(7).all()


def test_samples_come_in_the_order_of_the_index(shards: Path) -> None:
    images = EvaluationSet(open_shards(shards), size=8)
    assert len(images) == 20
    image, label, number = images[6]
    assert (image.shape, image.dtype, label, number) == ((3, 8, 8), torch.uint8, 2, 6)
    for workers in (0, 2):
        stream = evaluation_batches(images, range(20), batch_size=8, workers=workers)
        batches = [tuple(part.clone() for part in batch) for batch in stream]
        assert [len(batch[0]) for batch in batches] == [8, 8, 4]
        assert torch.cat([ids for _, _, ids in batches]).tolist() == list(range(20))
        assert torch.cat([labels for _, labels, _ in batches]).tolist() == [number % 4 for number in range(20)]
        assert torch.equal(batches[0][0][6], image)
    loaded = torch.cat([labels for _, labels, _ in DataLoader(images, batch_size=7)])
    assert loaded.tolist() == [number % 4 for number in range(20)]


def test_labels_and_ids_outlive_their_batch(shards: Path) -> None:
    images = EvaluationSet(open_shards(shards), size=8)
    kept = list(evaluation_batches(images, range(20), batch_size=2, workers=1))  # more batches than slots
    assert torch.cat([ids for _, _, ids in kept]).tolist() == list(range(20))
    assert torch.cat([labels for _, labels, _ in kept]).tolist() == [number % 4 for number in range(20)]


def test_images_without_labels_have_minus_one(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": encoded(0)})
    assert EvaluationSet(open_shards(tmp_path), size=8)[0][1] == -1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_line(tmp_path: Path, write_tar: Callable, workers: int) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"?"})
    images = EvaluationSet(open_shards(tmp_path), size=8)
    with pytest.raises(DataError, match=r"^Cannot decode a\.tar, key 'a', byte 512: no JPEG, PNG or WebP image\.$"):
        list(evaluation_batches(images, [0], batch_size=4, workers=workers))

from collections.abc import Callable
from pathlib import Path

import faiss
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features.extract import Extraction, eval_mode, extract_features
from ssl_pipeline.eval.knn import KnnMonitor, KnnMonitorConfig
from ssl_pipeline.schedule import Progress

WriteShards = Callable[..., Path]
PREPROCESSING = Preprocessing(16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


class MeanColour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_and_labels_come_in_the_order_of_the_index(test: str, workers: int, batch_size: int) -> None:
    index = open_shards(test)
    features, labels = extract_features(MeanColour(), index, PREPROCESSING, batch_size=batch_size, workers=workers)
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    for number, (image, label, _) in enumerate(EvaluationSet(index, 16)):
        expected = (image.float().mean(dim=(1, 2)) / 255 - mean) / std
        torch.testing.assert_close(features[number], expected, rtol=1e-4, atol=1e-5)
        assert labels[number] == label
        if number == len(index) - 1:
            break
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_some_samples_have_the_features_that_they_have_among_all(test: str) -> None:
    index, wanted = open_shards(test), [3, 4, 17, 30]
    settings = {"batch_size": 3, "workers": 0}
    features, labels = extract_features(MeanColour(), index, PREPROCESSING, **settings)
    some, some_labels = extract_features(MeanColour(), index, PREPROCESSING, **settings, samples=wanted)
    assert torch.equal(some, features[wanted])
    assert torch.equal(some_labels, labels[wanted])


def test_features_are_ordinary_tensors_without_gradient(test: str) -> None:
    backbone = nn.Sequential(MeanColour(), nn.Linear(3, 4))
    features, _ = extract_features(backbone, open_shards(test), PREPROCESSING, batch_size=16, workers=0)
    assert not features.requires_grad
    assert not features.is_inference()


def test_autocast_changes_the_precision_and_not_the_type(test: str) -> None:
    backbone = nn.Sequential(MeanColour(), nn.Linear(3, 4))
    full, half = (
        extract_features(backbone, open_shards(test), PREPROCESSING, batch_size=16, workers=0, precision=precision)[0]
        for precision in ("no", "bf16")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)


def test_unlabelled_images_have_label_minus_one(write_shards: WriteShards, tmp_path: Path) -> None:
    index = open_shards(write_shards(tmp_path / "some", [2, None, 1]))
    _, labels = extract_features(MeanColour(), index, PREPROCESSING, batch_size=2, workers=0)
    assert labels.tolist() == [2, -1, 1]


def fail_in_eval_mode(network: nn.Module) -> None:
    assert not any(part.training for part in network.modules())
    raise RuntimeError("dropped")


def test_every_module_gets_its_own_mode_back_even_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    with pytest.raises(RuntimeError, match="dropped"), eval_mode(network):
        fail_in_eval_mode(network)
    assert [network.training, network[0].training, network[1].training] == [True, True, False]


def on_one_rank(rank: int, world_size: int, folder: Path, train: str) -> None:
    faiss.omp_set_num_threads(1)  # OpenMP's threads do not survive the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found: dict[str, object] = {
        size: extract_features(MeanColour(), open_shards(folder / size), PREPROCESSING, batch_size=2, workers=0)
        for size in ("five", "four")
    }
    config = KnnMonitorConfig(every="1ep", train=train, val=str(folder / "five"), k=7)
    monitor = KnnMonitor(config, Extraction(PREPROCESSING, batch_size=16, workers=0))
    found["knn"] = monitor(MeanColour(), Progress(step=0, total_steps=1, steps_per_epoch=1.0))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_find_what_one_finds(write_shards: WriteShards, tmp_path: Path, train: str) -> None:
    """Five images on three ranks are shares of 2, 2 and 1; four are 2, 2 and none."""
    for size, labels in (("five", [0, 1, 2, 5, 4]), ("four", [0, 1, 2, 3])):
        open_shards(write_shards(tmp_path / size, labels))
    open_shards(train)
    mp.start_processes(on_one_rank, args=(3, tmp_path, train), nprocs=3, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for size in ("five", "four"):
        features, labels = extract_features(
            MeanColour(), open_shards(tmp_path / size), PREPROCESSING, batch_size=2, workers=0
        )
        for rank in range(3):
            torch.testing.assert_close(found[rank][size], (features, labels))
    config = KnnMonitorConfig(every="1ep", train=train, val=str(tmp_path / "five"), k=7)
    monitor = KnnMonitor(config, Extraction(PREPROCESSING, batch_size=16, workers=0))
    expected = monitor(MeanColour(), Progress(step=0, total_steps=1, steps_per_epoch=1.0))
    for rank in range(3):
        assert found[rank]["knn"] == pytest.approx(expected)

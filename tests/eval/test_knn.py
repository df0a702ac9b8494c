import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import ConfigError, load, run_command
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features.cache import map_stored
from ssl_pipeline.eval.features.extract import Extraction, extract_features
from ssl_pipeline.eval.knn import (
    KnnConfig,
    KnnMonitor,
    KnnMonitorConfig,
    main,
    weighted_knn,
)
from ssl_pipeline.eval.labelled import open_labelled, some_of_each_class
from ssl_pipeline.eval.protocol import LabelledFeatures, model_features
from ssl_pipeline.eval.results import read_results
from ssl_pipeline.eval.search.neighbours import nearest_neighbours, other_neighbours
from ssl_pipeline.eval.votes import votes_accuracy
from ssl_pipeline.schedule import Progress

WriteShards = Callable[..., Path]
NUM_CLASSES = 6
PREPROCESSING = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def knn_in_loops(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float, num_classes: int
) -> list[list[float]]:
    """DINO's vote, one query and one neighbour at a time."""
    scores = []
    for query in test.double():
        similarities = [float(query @ other) for other in train.double()]
        nearest = sorted(range(len(train)), key=lambda number: -similarities[number])[:k]
        row = [0.0] * num_classes
        for number in nearest:
            row[int(labels[number])] += math.exp(similarities[number] / temperature)
        scores.append(row)
    return scores


def random_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    train, test = (normalize(torch.randn(count, 12, generator=generator), dim=1) for count in (60, 25))
    labels, test_labels = (torch.randint(0, 7, (count,), generator=generator) for count in (60, 25))
    return train, labels, test, test_labels


def test_two_near_neighbours_outvote_one_nearer() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
    scores = weighted_knn(
        train, torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 0.0]]), k=3, temperature=0.5, num_classes=3
    )
    # class 0: exp(1 / 0.5); class 1: twice exp(0.8 / 0.5); class 2 is no neighbour
    torch.testing.assert_close(scores, torch.tensor([[math.exp(2.0), 2 * math.exp(1.6), 0.0]]))


def test_a_low_temperature_lets_the_nearest_neighbour_decide() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    winners = [
        weighted_knn(train, labels, query, k=3, temperature=temperature, num_classes=2).argmax().item()
        for temperature in (1.0, 0.07)
    ]
    assert winners == [1, 0]


@pytest.mark.parametrize("k", [1, 5, 60])
def test_scores_are_those_of_the_loop(k: int) -> None:
    train, labels, test, _ = random_problem()
    scores = weighted_knn(train, labels, test, k=k, temperature=0.07, num_classes=9)
    expected = knn_in_loops(train, labels, test, k=k, temperature=0.07, num_classes=9)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-3)


def test_equal_neighbours_vote_equally() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    scores = weighted_knn(
        train, torch.tensor([0, 1, 0, 1]), torch.tensor([[1.0, 0.0]]), k=4, temperature=0.1, num_classes=2
    )
    assert scores[0, 0] == scores[0, 1]


def test_several_k_at_once_are_each_k_alone() -> None:
    train, labels, test, test_labels = random_problem()
    similarities_NK, neighbours_NK = nearest_neighbours(train, test, k=60)
    settings = {"temperature": 0.07, "num_classes": 7}
    together = votes_accuracy(similarities_NK, labels[neighbours_NK], test_labels, k=(3, 10, 60), **settings)
    assert list(together) == [3, 10, 60]
    for k in (3, 10, 60):
        similarities_NK, neighbours_NK = nearest_neighbours(train, test, k=k)
        alone = votes_accuracy(similarities_NK, labels[neighbours_NK], test_labels, k=(k,), **settings)
        assert together[k] == alone[k]
        scores = weighted_knn(train, labels, test, k=k, **settings)
        assert together[k]["top1"] == pytest.approx(100 * (scores.argmax(dim=1) == test_labels).double().mean().item())


def test_the_same_call_gives_the_same_bits() -> None:
    train, labels, test, _ = random_problem()
    first, second = (weighted_knn(train, labels, test, k=20, temperature=0.07, num_classes=7) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 61}, r"between 1 and the number of training images \(60\). Got k=61"),
        ({"k": 0}, "Got k=0"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"temperature": 0.005}, "overflow at temperature=0.005"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, float], message: str) -> None:
    train, labels, _, _ = random_problem()
    with pytest.raises(ConfigError, match=message):
        weighted_knn(train, labels, train, **{"k": 20, "temperature": 0.07, "num_classes": 7, **change})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    train, labels, test, _ = random_problem()
    test[3, 1] = value
    with pytest.raises(ConfigError, match="1 of 25 test images have NaN or infinity"):
        weighted_knn(train, labels, test, k=20, temperature=0.07, num_classes=7)


def knn(*arguments: str) -> int:
    return run_command(KnnConfig, main, command="python -m eval.knn", argv=["workers=0", *arguments])


def test_a_run_is_measured_and_reported(run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert knn(f"run={run}", f"train={train}", f"test={test}", "k=5,10", "baselines=true") == 0
    report = json.loads((run / "eval" / "knn.json").read_text())
    assert report["by_k"]["5"] == {"top1": report["top1"], "top5": report["top5"]}
    assert set(report["by_k"]) == {"5", "10"}
    assert set(report["baselines"]) == {"raw_pixels", "random"}
    assert report["baselines"]["raw_pixels"]["top1"] > 90.0  # the classes are colours
    assert "16 x 16 pixels" in report["baselines"]["raw_pixels"]["about"]["images"]
    protocol = report["protocol"]
    assert (protocol["k"], protocol["temperature"], protocol["size"]) == ([5, 10], 0.07, 16)
    assert (protocol["num_train"], protocol["num_test"], protocol["num_classes"]) == (72, 31, 6)
    assert protocol["subject"]["method"] == "dino"
    assert protocol["subject"]["backbone"]["name"] == "vit_tiny_patch16_224"
    printed = capsys.readouterr().out
    for words in ("top-1, k=5", "top-5, k=10", "raw pixels", "random initialisation", "pretrained"):
        assert words in printed


def test_the_search_does_not_change_the_report(run: Path, train: str, test: str) -> None:
    reports = []
    for search in ("faiss", "blocks", "auto"):
        assert knn(f"run={run}", f"train={train}", f"test={test}", "k=5,20", f"search={search}") == 0
        report = json.loads((run / "eval" / "knn.json").read_text())
        assert report["protocol"].pop("search") == search
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]


def report_of(run: Path, *arguments: str) -> dict:
    assert knn(f"run={run}", *arguments) == 0
    return json.loads((run / "eval" / "knn.json").read_text())


@pytest.mark.parametrize("more", [(), ("per_class=4",)])
def test_accuracy_does_not_depend_on_the_length_of_features(
    run: Path, train: str, test: str, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    settings = (f"train={train}", f"test={test}", "k=7", "temperature=0.5", *more)
    before = report_of(run, *settings)

    def stretched(*arguments: object, **settings: object) -> LabelledFeatures:
        features = model_features(*arguments, **settings)  # type: ignore[arg-type]
        lengths = torch.linspace(0.2, 5, len(features.train))[:, None]
        return replace(features, train=lengths * features.train, test=3 * features.test)

    monkeypatch.setattr("ssl_pipeline.eval.protocol.model_features", stretched)
    assert report_of(run, *settings) == before


def test_several_temperatures_at_once_are_each_alone(
    run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = (f"train={train}", f"test={test}", "k=5,20")
    together = report_of(run, *sets, "temperature=0.07,1")
    assert "pretrained, temperature 0.07" in capsys.readouterr().out
    for temperature in ("0.07", "1.0"):
        assert together["by_temperature"][temperature] == report_of(run, *sets, f"temperature={temperature}")["by_k"]
    assert together["by_k"] == together["by_temperature"]["0.07"]


def test_a_figure_has_one_name_whatever_else_is_measured(run: Path, train: str, test: str) -> None:
    sets, names = (f"train={train}", f"test={test}"), []
    for asked in ("0.07", "1", "0.07,1", "1,0.07"):
        report = report_of(run, *sets, "k=5", f"temperature={asked}")
        names.append([measure["name"] for measure in report["measures"] if measure["name"].startswith("top1")])
    assert names[:2] == [["top1_k5"], ["top1_k5_temperature1"]]
    assert names[2:] == [[*names[0], *names[1]], [*names[1], *names[0]]]
    rows = read_results(run / "eval" / "results.csv")
    assert sorted(row["measure"] for row in rows if row["model"] == "pretrained") == [
        *(f"{top}_k5{by}" for top in ("top1", "top5") for by in ("", "_temperature1")),
    ]


def test_leaving_one_out_is_the_loop_over_all_others(run: Path, train: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report_of(run, f"train={train}", f"test={train}", "k=3", "leave_one_out=true")
    assert "warning" not in capsys.readouterr().err
    (cached,) = (run / "eval" / "cache").iterdir()
    stored = map_stored(cached)
    features, labels = normalize(stored.features["pooled"], dim=1), stored.labels
    right = 0
    for image in range(72):
        others = [other for other in range(72) if other != image]
        scores = knn_in_loops(features[others], labels[others], features[[image]], k=3, temperature=0.07, num_classes=6)
        right += max(range(6), key=lambda label: scores[0][label]) == labels[image]
    assert found["top1"] == pytest.approx(100 * right / 72)
    assert found["top1_interval"][0] < found["top1"] < found["top1_interval"][1]


def test_classes_of_one_image_cannot_be_left_out_one_by_one(
    run: Path, write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_shards(tmp_path / "alone", list(range(6)))
    assert knn(f"run={run}", f"train={alone}", f"test={alone}", "k=3", "leave_one_out=true") == 2
    assert "needs two images of a class. Got 6 images of as many classes" in capsys.readouterr().err


def test_an_image_with_many_copies_is_left_out_too() -> None:
    similarities, neighbours = other_neighbours(torch.ones(5, 2), k=2)
    assert similarities.shape == neighbours.shape == (5, 2)
    assert not (neighbours == torch.arange(5)[:, None]).any()


def test_a_few_images_of_each_class_vote(train: str, test: str) -> None:
    images = open_labelled(train, test, task="k-NN")
    chosen = some_of_each_class(images, 3, seed=0)
    assert images.train_labels[chosen].bincount().tolist() == [3] * 6
    assert set(chosen) < set(some_of_each_class(images, 4, seed=0))
    assert chosen.tolist() != some_of_each_class(images, 3, seed=1).tolist()


def test_a_timm_model_is_measured_without_a_run(
    train: str, test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["backbone=vit_tiny_patch16_224", "arguments={depth: 1, embed_dim: 24, num_heads: 2}", "size=32"]
    output = tmp_path / "measured"
    assert knn(*model, f"train={train}", f"test={test}", f"output={output}") == 0
    assert "vit_tiny_patch16_224 at random initialisation" in capsys.readouterr().out
    assert json.loads((output / "eval" / "knn.json").read_text())["protocol"]["size"] == 32


def test_random_initialisation_is_the_same_every_time(run: Path, train: str, test: str) -> None:
    reports = []
    for _ in range(2):
        torch.rand(3)  # the state of the global generator does not matter
        assert knn(f"run={run}", f"train={train}", f"test={test}", "baselines=true", "k=5") == 0
        reports.append(json.loads((run / "eval" / "knn.json").read_text()))
        for cached in (run / "eval" / "cache").iterdir():
            rmtree(cached)
    assert reports[0]["baselines"] == reports[1]["baselines"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give either run=DIR or backbone=NAME"),
        (("run=a", "backbone=resnet18"), "Give either run=DIR or backbone=NAME"),
        (("run=a", "weights=b.pth"), "weights belongs to backbone=NAME"),
        (("backbone=resnet19",), "Did you mean"),
        (("backbone=resnet18", "weights=absent.pth"), "absent.pth"),
        (("backbone=resnet18", "weights=absent_tag"), "absent_tag"),
        (("backbone=resnet18", "arguments.num_classes=3"), "the head is always left out"),
        (("backbone=raw_pixels", "k=73"), r"number of training images (72). Got k=73"),
        (("backbone=raw_pixels", "per_class=2", "k=13"), "number of training images (12). Got k=13"),
        (("backbone=raw_pixels", "per_class=13"), "has of one of its classes: 12"),
        (("backbone=raw_pixels", "leave_one_out=true"), "leave_one_out=true classifies the images of train: set test="),
        (("backbone=raw_pixels", "k=[]"), "k must"),
        (("backbone=raw_pixels", "temperature=0"), "temperature must be above 0"),
        (("backbone=raw_pixels", "device=tpuu"), "device must be auto, cpu or cuda"),
        (("run=no/such/run",), "run=no/such/run must be the directory of a run. There is no such directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert knn(f"train={train}", f"test={test}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.strip().splitlines()) <= 2  # the second may point to --help


def test_missing_labels_name_the_shards(
    train: str, write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = write_shards(tmp_path / "unlabelled", [None] * 5)
    assert knn("backbone=raw_pixels", f"train={train}", f"test={unlabelled}") == 2
    assert f"{unlabelled} has no labels; k-NN needs them in train and test." in capsys.readouterr().err


def test_class_names_must_agree(write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats = write_shards(tmp_path / "cats", [0, 1] * 3, names=("cat", "dog"))
    birds = write_shards(tmp_path / "birds", [0, 1] * 3, names=("bird", "dog"))
    assert knn("backbone=raw_pixels", f"train={cats}", f"test={birds}", "k=1") == 0
    assert "3 of 6" in capsys.readouterr().err, "a class that training lacks is a warning"
    others = write_shards(tmp_path / "others", [0, 1] * 3, names=("owl", "cow"))
    assert knn("backbone=raw_pixels", f"train={cats}", f"test={others}", "k=1") == 2
    assert (
        "must have classes in common. The first has 'cat', 'dog', the second 'owl', 'cow'." in capsys.readouterr().err
    )


def test_labels_beyond_the_class_names_are_refused(
    write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets = write_shards(tmp_path / "pets", [0, 1, 2] * 3, names=("cat", "dog"))
    assert knn("backbone=raw_pixels", f"train={pets}", f"test={pets}", "k=1") == 2
    assert "below the number of class names (2). Got 2." in capsys.readouterr().err


def test_k_takes_one_value_or_several() -> None:
    model = ["backbone=raw_pixels", "train=a", "test=b"]
    for text, k in (("20", (20,)), ("10,20", (10, 20)), ("[10,20,100,200]", (10, 20, 100, 200))):
        assert load(KnnConfig, [*model, f"k={text}"]).k == k


class Pooled(nn.Module):
    """Mean colour under batch norm and dropout, whose modes would show."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Sequential(nn.Dropout(0.5)).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.frozen(self.norm(images)).mean(dim=(2, 3))


class Brightness(nn.Module):
    def forward(self, colours: Tensor) -> Tensor:
        angle = 50 * colours.sum(dim=1)
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def monitor(train: str, val: str | None, **settings: float | str) -> KnnMonitor:
    config = KnnMonitorConfig(**{"every": "1ep", "train": train, "val": val, "k": 5, **settings})
    return KnnMonitor(config, Extraction(PREPROCESSING, batch_size=16, workers=0))


def test_the_monitor_measures_what_the_command_would(train: str, test: str) -> None:
    backbone = Pooled()
    results = monitor(train, test)(backbone, Progress(step=3, total_steps=10, steps_per_epoch=2.0))
    assert set(results) == {"knn_top1", "knn_top5"}
    assert results["knn_top1"] > 90.0
    assert results["knn_top5"] >= results["knn_top1"]


def test_the_monitor_leaves_one_out_without_validation_images(train: str) -> None:
    progress = Progress(step=3, total_steps=10, steps_per_epoch=2.0)
    colour = nn.Sequential(Pooled().eval(), Brightness())  # which says less of the class than of the image
    found = monitor(train, None, images=30, k=1)(colour, progress)
    index = open_shards(train)
    used = [number * len(index) // 30 for number in range(30)]
    features, _ = extract_features(colour, index, PREPROCESSING, batch_size=16, workers=0, device="cpu")
    rows, labels = normalize(features[used], dim=1), torch.from_numpy(index.labels()[used])
    nearest = (rows @ rows.T).fill_diagonal_(-2).argmax(dim=1)
    assert found["knn_top1"] == pytest.approx(100 * (labels[nearest] == labels).double().mean().item())
    assert found["knn_top1"] < 100, "an image that votes for itself would be always right"
    with pytest.raises(ConfigError, match="29"):
        monitor(train, None, images=30, k=30)


class Longer(nn.Module):
    """Features whose length says how bright an image is."""

    def forward(self, features: Tensor) -> Tensor:
        return features * (3 + features.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("one_set", [False, True])
def test_the_monitor_does_not_depend_on_the_length_of_features(train: str, test: str, one_set: bool) -> None:
    progress = Progress(step=3, total_steps=10, steps_per_epoch=2.0)
    measure = monitor(train, None if one_set else test)
    colours = nn.Sequential(Pooled().eval(), Brightness())
    assert measure(nn.Sequential(colours, Longer()), progress) == measure(colours, progress)


def test_the_monitor_resizes_as_its_settings_say(train: str, test: str) -> None:
    assert monitor(train, test).extraction.preprocessing == PREPROCESSING
    assert monitor(train, test, interpolation="bilinear").extraction.preprocessing == replace(
        PREPROCESSING, interpolation="bilinear"
    )


def test_the_monitor_leaves_training_as_it_was(train: str, test: str) -> None:
    backbone = Pooled()
    statistics = backbone.norm.running_mean.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    monitor(train, test)(backbone, Progress(step=0, total_steps=1, steps_per_epoch=1.0))
    assert backbone.training
    assert backbone.norm.training
    assert not backbone.frozen.training
    torch.testing.assert_close(backbone.norm.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_the_monitor_finds_mistakes_before_training_starts(
    train: str, test: str, write_shards: WriteShards, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training images \(72\). Got k=100"):
        monitor(train, test, k=100)
    alone = str(write_shards(tmp_path / "alone", list(range(6))))
    with pytest.raises(ConfigError, match=r"two images of a class\. Got 6 images of as many classes"):
        monitor(alone, None, k=1)
    assert monitor(alone, alone, k=1).used == list(range(6))
    unlabelled = str(write_shards(tmp_path / "unlabelled", [None] * 5))
    with pytest.raises(ConfigError, match="has no labels"):
        monitor(train, unlabelled)

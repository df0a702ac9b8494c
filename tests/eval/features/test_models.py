import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml

from ssl_pipeline.backbones import load_backbone, save_backbone
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.features.models import ModelConfig, baselines_of, open_model, raw_pixels
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn

TINY_VIT = "{img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"


def settings(*arguments: str) -> ModelConfig:
    return load(ModelConfig, arguments)


def test_a_run_brings_its_weights_and_preprocessing(run: Path) -> None:
    model = open_model(settings(f"run={run}"))
    backbone, preprocessing = load_backbone(run)
    assert model.preprocessing == preprocessing
    torch.testing.assert_close(model.backbone.state_dict(), backbone.state_dict())


def test_the_interpolation_reaches_features_baselines_and_report(run: Path, train: str, test: str) -> None:
    chosen = [f"run={run}", "interpolation=bilinear", "size=8"]
    model = open_model(settings(*chosen))
    everything = [model, *baselines_of(model).values()]
    assert [each.preprocessing.interpolation for each in everything] == ["bilinear"] * 3
    config = load(KnnConfig, [*chosen, f"train={train}", f"test={test}", "k=3", "workers=0"])
    assert evaluate_knn(config)["protocol"]["interpolation"] == "bilinear"
    features = [
        extract_features(each.backbone, open_shards(train), each.preprocessing, batch_size=16, workers=0)[0]
        for each in (model, open_model(settings(f"run={run}", "size=8")))
    ]
    assert not torch.equal(*features)


def test_size_overrides_that_of_the_run(run: Path) -> None:
    assert open_model(settings(f"run={run}", "size=24")).preprocessing.size == 24


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["backbone=convnext_atto", "size=16"], "Try size=32."),
        pytest.param(
            ["backbone=cait_xxs24_224", "size=96"], "Try size=224, or arguments.img_size=96.", marks=pytest.mark.other
        ),
    ],
)
def test_images_that_the_network_does_not_take_are_told_before_they_are_read(arguments, advice) -> None:
    with pytest.raises(ConfigError, match=r"^size=\d+ does not suit the backbone") as error:
        open_model(settings(*arguments))
    assert str(error.value).endswith(advice)


def test_a_run_is_not_told_to_change_arguments_that_it_brings(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"^size=20 does not suit .* Try size=24\.$"):
        open_model(settings(f"run={run}", "size=20"))


def test_a_weights_file_gives_the_network_of_the_run(run: Path) -> None:
    file = run / "backbone.safetensors"
    arguments = ["backbone=vit_tiny_patch16_224", f"arguments={TINY_VIT}", f"weights={file}", "size=16"]
    model = open_model(settings(*arguments, "mean=0.5,0.5,0.5", "std=0.25,0.25,0.25"))
    expected = open_model(settings(f"run={run}"))
    assert model.preprocessing == expected.preprocessing
    torch.testing.assert_close(model.backbone.state_dict(), expected.backbone.state_dict())


def test_the_weights_of_a_run_and_of_a_file_are_told(run: Path) -> None:
    assert re.fullmatch(
        r"the run's evaluated backbone \(backbone\.safetensors\); SHA-256 [0-9a-f]{16}",
        open_model(settings(f"run={run}")).weights,
    )
    arguments = ["backbone=vit_tiny_patch16_224", f"arguments={TINY_VIT}"]
    random = open_model(settings(*arguments))
    assert (random.label, random.weights) == (
        "vit_tiny_patch16_224 at random initialisation",
        "random initialisation, seed 0",
    )
    of_file = open_model(settings(*arguments, f"weights={run}/backbone.safetensors"))
    assert of_file.label == "vit_tiny_patch16_224, backbone.safetensors"
    assert re.search(r"backbone\.safetensors, took (\d+) of \1 tensors; SHA-256", of_file.weights)
    of_run = open_model(settings(*arguments, f"weights={run}"))
    torch.testing.assert_close(of_run.backbone.state_dict(), of_file.backbone.state_dict())


def test_a_tag_in_the_name_is_refused_and_written_out() -> None:
    with pytest.raises(ConfigError, match=r"Got 'resnet18\.a1_in1k'; write backbone=resnet18 weights=a1_in1k"):
        settings("backbone=resnet18.a1_in1k")
    with pytest.raises(ConfigError, match=r"weights_from=teacher says which network of weights is measured"):
        settings("backbone=resnet18", "weights_from=teacher")


def test_an_evaluation_begins_by_saying_whose_weights_it_measures(
    run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate_knn(KnnConfig(run=run, train=train, test=test, k=(5,), workers=0))
    assert capsys.readouterr().out.startswith(
        "pretrained: the run's evaluated backbone (backbone.safetensors); SHA-256 "
    )
    assert report["protocol"]["label"] == "pretrained"


def test_the_random_baseline_has_the_architecture_and_not_the_weights(run: Path) -> None:
    model = open_model(settings(f"run={run}"))
    random = baselines_of(model)["random"]
    shapes, expected = (
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (random.backbone, model.backbone)
    )
    assert shapes == expected
    weight = "model.patch_embed.proj.weight"
    assert not torch.equal(random.backbone.state_dict()[weight], model.backbone.state_dict()[weight])


def test_making_a_random_baseline_leaves_the_random_state_alone(run: Path) -> None:
    model = open_model(settings(f"run={run}"))
    state = torch.get_rng_state()
    baselines_of(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "side"), [(224, 32), (16, 16)])
def test_raw_pixels_are_at_most_32_by_32(size: int, side: int) -> None:
    model = raw_pixels(size)
    assert model.preprocessing.size == side
    image = torch.rand(2, 3, side, side)
    assert torch.equal(model.backbone(image), image.flatten(1))
    assert f"{side} x {side}" in str(model.about["images"])


def test_other_weights_or_images_never_meet_old_features(
    run: Path, train: str, test: str, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    cache = run / "eval" / "cache"
    config = KnnConfig(run=run, train=train, test=test, k=(5,), workers=0)
    evaluate_knn(config)
    evaluate_knn(config)
    assert len(list(cache.iterdir())) == 2  # training and test images
    backbone, preprocessing = load_backbone(run)
    with torch.no_grad():
        backbone.model.norm.weight.mul_(2.0)
    save_backbone(run, backbone, preprocessing)
    evaluate_knn(config)
    assert len(list(cache.iterdir())) == 4
    others = str(write_shards(tmp_path / "others", [0, 1, 2], seed=9))
    evaluate_knn(config.model_copy(update={"test": others}))
    assert len(list(cache.iterdir())) == 5
    evaluate_knn(config.model_copy(update={"size": 24}))
    assert len(list(cache.iterdir())) == 7


def test_a_moved_run_keeps_its_features(run: Path, train: str, test: str, tmp_path: Path) -> None:
    evaluate_knn(KnnConfig(run=run, train=train, test=test, k=(5,), workers=0))
    moved = run.rename(tmp_path / "moved")
    report = evaluate_knn(KnnConfig(run=moved, train=train, test=test, k=(5,), workers=0))
    assert len(list((moved / "eval" / "cache").iterdir())) == 2
    assert json.loads(json.dumps(report))["protocol"]["subject"]["run"] == str(moved)


def test_images_are_normalised_as_the_weights_want_them(tmp_path, capsys) -> None:
    file = tmp_path / "weights.pth"
    half = (0.5, 0.5, 0.5)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, **yaml.safe_load(TINY_VIT)).state_dict(), file)
    network = ["backbone=vit_tiny_patch16_224", f"arguments={TINY_VIT}", "size=16"]
    found = open_model(settings(*network, f"weights={file}")).preprocessing
    assert (found.mean, found.std) == (half, half)
    assert "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5 of timm's vit_tiny_patch16_224. Set" in capsys.readouterr().out
    found = open_model(settings(*network, f"weights={file}", "mean=0.1,0.2,0.3", "std=0.4,0.5,0.6")).preprocessing
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    random = open_model(settings(*network)).preprocessing
    assert (random.mean, random.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "normalised" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "/backbone.safetensors"])
def test_the_colours_of_a_run_come_with_its_weights(run: Path, place: str) -> None:
    arguments = ["backbone=vit_tiny_patch16_224", f"arguments={TINY_VIT}", f"weights={run}{place}", "size=16"]
    assert open_model(settings(*arguments)).preprocessing == load_backbone(run)[1]

"""What `eval.export` writes is read by the programs that it is for, and they compute the backbone's features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from ssl_pipeline.backbones import (
    Backbone,
    BackboneConfig,
    Preprocessing,
    create_backbone,
    load_backbone,
    load_run,
    save_backbone,
)
from ssl_pipeline.backbones.classifier import save_classifier
from ssl_pipeline.config import ConfigError, RunError, load
from ssl_pipeline.eval.export import ExportConfig, export
from ssl_pipeline.eval.exports import comparison, onnx_graph, timm_folder
from ssl_pipeline.files import sha256_of
from tests.tiny import VIT

CNN = BackboneConfig(name="test_resnet")
SMALL = BackboneConfig(name="test_resnet", arguments={"stem_type": ""}, small_images=True)
RESAMPLED = BackboneConfig(name="vit_tiny_patch16_224", arguments={"embed_dim": 24, "depth": 1, "num_heads": 2})


def run_with(place: Path, config: BackboneConfig, *, size: int = 32) -> tuple[Path, Backbone]:
    """A finished run with this backbone at random."""
    torch.manual_seed(0)
    run, backbone = place / "run", create_backbone(config).eval()
    save_backbone(run, backbone, Preprocessing(size, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)), step=3)
    return run, backbone


def exported(run: Path, format: str, *arguments: str) -> Path:
    output = run.parent / format
    export(load(ExportConfig, [f"run={run}", f"output={output}", f"format={format}", *arguments]))
    return output


def images(size: int = 32, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("config", "size"), [(VIT, 16), (CNN, 32), (RESAMPLED, 64)], ids=["vit", "cnn", "resampled"])
def test_timm_reads_the_folder(tmp_path, config, size, capsys):
    run, backbone = run_with(tmp_path, config, size=size)
    folder = exported(run, "timm")
    assert "read again with timm: features differ by at most" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(model(images(size)), backbone(images(size)), rtol=1e-4, atol=1e-4)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, size, size)
    assert (tuple(data["mean"]), tuple(data["std"])) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_other_sizes_go_where_the_network_takes_them(tmp_path):
    run, backbone = run_with(tmp_path, CNN)
    model = timm.create_model(f"local-dir:{exported(run, 'timm')}", pretrained=True).eval()
    torch.testing.assert_close(model(images(48)), backbone(images(48)), rtol=1e-4, atol=1e-4)
    vit_run, _ = run_with(tmp_path / "vit", RESAMPLED, size=64)
    vit = timm.create_model(f"local-dir:{exported(vit_run, 'timm')}", pretrained=True).eval()
    assert vit(images(96)).shape == (3, 24)


def test_networks_that_timm_cannot_build_are_refused(tmp_path):
    run, _ = run_with(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"a stem that timm cannot build\. format=onnx works"):
        exported(run, "timm")
    own, _ = run_with(tmp_path / "own", BackboneConfig(name="wide_resnet28_2"))
    with pytest.raises(ConfigError, match="this library's own network"):
        exported(own, "huggingface")


@pytest.mark.parametrize("format", ["timm", "huggingface", "onnx"])
def test_a_reversible_network_is_refused_before_anything_is_written(tmp_path, monkeypatch, format):
    monkeypatch.setattr("ssl_pipeline.eval.export.require_onnx", lambda: None)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    run, backbone = run_with(
        tmp_path, BackboneConfig(name="vit_tiny_patch16_224", arguments=arguments, reversible=True), size=16
    )
    with pytest.raises(ConfigError, match=r"two streams .*\. format=backbone works"):
        exported(run, format)
    assert not (tmp_path / format).exists()
    written = load_backbone(exported(run, "backbone"))[0].eval()
    torch.testing.assert_close(written(images(16)), backbone(images(16)))


def test_nothing_appears_if_a_reader_computes_something_else(tmp_path, monkeypatch):
    run, _ = run_with(tmp_path, VIT, size=16)
    original = comparison.expected_features
    monkeypatch.setattr(timm_folder, "expected_features", lambda *a: original(*a) + 1e-3)
    with pytest.raises(RunError, match=r"timm computes different features from the backbone: they differ by 0\.001"):
        exported(run, "timm")
    assert list((tmp_path / "timm").iterdir()) == []


def test_a_graph_that_may_take_minutes_is_announced(tmp_path, monkeypatch, capsys):
    run, _ = run_with(tmp_path, CNN)
    said_before: list[str] = []
    monkeypatch.setattr(onnx_graph, "_export", lambda *_: said_before.append(capsys.readouterr().err))
    monkeypatch.setattr(onnx_graph, "_difference", lambda *_: 0.0)
    onnx_graph.write_graph(tmp_path, load_run(run))
    assert said_before == ["Making the ONNX graph: seconds for most networks, minutes for deep CNNs ...\n"]


def test_features_of_another_shape_are_refused():
    with pytest.raises(RunError, match=r"makes features of shape \(2, 3\), the backbone \(2, 4\)"):
        comparison.require_same(torch.zeros(2, 3), torch.zeros(2, 4), reader="onnxruntime")
    with pytest.raises(RunError, match="differ by nan"):
        comparison.require_same(torch.full((2, 3), torch.nan), torch.zeros(2, 3), reader="onnxruntime")


def test_files_of_others_are_never_replaced(tmp_path):
    run, _ = run_with(tmp_path, VIT, size=16)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"has a README\.md already"):
        exported(run, "timm")


def test_a_card_tells_recipe_images_results_and_licences(tmp_path):
    run, _ = run_with(tmp_path, VIT, size=16)
    (run / "config.yaml").write_text("recipe: dino_vits16\nmethod: {name: dino}\nbackbone: {weights: /a/b/FILE.pth}\n")
    data = {"shards": "photos", "images": 1234, "fingerprint": "0123456789abcdef0123"}
    (run / "run.json").write_text(json.dumps({"starts": [{"data": data, "labelled data": None}]}))
    card = (exported(run, "timm", "images_licence=CC BY 4.0") / "README.md").read_text()
    for row in (
        "| recipe | dino_vits16 |",
        "| method | dino |",
        "| training images | 1,234 |",
        "| optimizer steps | 3 |",
        "| started from | FILE.pth |",
        "| images | CC BY 4.0 |",
        "| starting weights | not stated |",
        "| size | 16 x 16 pixels |",
    ):
        assert row in card, row
    assert card.startswith("---\nlicense: unknown\nlibrary_name: timm\n")
    assert "The run has no evaluation of these weights" in card
    assert 'timm.create_model("local-dir:timm", pretrained=True)' in card
    assert str(tmp_path) not in card
    assert "/a/b" not in card
    assert "classifier" not in card


@pytest.mark.parametrize(
    ("settings", "title", "tag"),
    [
        ("method: {name: dino}\nbackbone: {weights: null}\n", "pretrained without labels", "self-supervised-learning"),
        (
            "method: {name: dino}\nbackbone: {weights: /runs/first}\n",
            "pretrained without labels, starting from first",
            "self-supervised-learning",
        ),
        (
            "method: {name: supervised}\nbackbone: {weights: /runs/first/backbone.safetensors}\n",
            "fine-tuned with labels, starting from first/backbone.safetensors",
            "supervised",
        ),
        ("method: {name: supervised}\nbackbone: {weights: null}\n", "trained with labels", "supervised"),
        (
            "method: {name: fixmatch}\ndata: {labelled: {shards: ten}}\n",
            "trained with few labels",
            "semi-supervised-learning",
        ),
    ],
)
def test_title_and_tags_of_a_card_follow_the_method(tmp_path, settings, title, tag, capsys):
    run, _ = run_with(tmp_path, VIT, size=16)
    (run / "config.yaml").write_text(settings)
    save_classifier(run, torch.nn.Linear(2, 2), None)
    card = (exported(run, "timm") / "README.md").read_text()
    assert f"# {VIT.name}, {title}\n" in card
    tags = {"self-supervised-learning", "semi-supervised-learning", "supervised"}
    assert {one for one in tags if f"\n- {one}\n" in card} == {tag}
    told = "The classifier that the run has learnt is not part of the export: classifier.safetensors of the run has it."
    assert told in card
    assert told in capsys.readouterr().out


def test_results_stand_in_the_card_if_they_are_of_these_weights(tmp_path):
    run, _ = run_with(tmp_path, VIT, size=16)
    sha256 = sha256_of(run / "backbone.safetensors")
    (run / "eval").mkdir()
    for subject, shown in ((sha256, True), ("of another step", False)):
        protocol = {"subject": {"weights_sha256": subject}, "num_train": 1437, "num_test": 360, "num_classes": 10}
        report = {"top1": 95.28, "baselines": {"random": {"top1": 76.94}}, "protocol": protocol}
        (run / "eval" / "knn.json").write_text(json.dumps(report))
        output = tmp_path / f"shown {shown}"
        export(load(ExportConfig, [f"run={run}", f"output={output}", "format=timm"]))
        row = "| eval.knn | top-1 | 95.28 % | 76.94 % | 1,437 / 360 |"
        assert (row in (output / "README.md").read_text()) is shown


def test_the_licence_of_timms_weights_is_known(tmp_path):
    run, _ = run_with(tmp_path, BackboneConfig(name="test_resnet"))
    (run / "config.yaml").write_text("backbone: {weights: r160_in1k}\n")
    assert "| starting weights | apache-2.0 |" in (exported(run, "timm") / "README.md").read_text()


def test_licences_need_a_card(tmp_path):
    with pytest.raises(ConfigError, match="go into a model card, which format=backbone does not write"):
        load(ExportConfig, ["run=x", "output=y", "images_licence=MIT"])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_pipeline.eval.exports.onnx_graph.find_spec", lambda name: None)
    run, _ = run_with(tmp_path, VIT, size=16)
    with pytest.raises(ConfigError, match=r"format=onnx needs onnx and onnxruntime and onnxscript\. pip install"):
        exported(run, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("config", [VIT, CNN], ids=["vit", "cnn"])
def test_transformers_reads_the_folder(tmp_path, config):
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
    run, backbone = run_with(tmp_path, config, size=16)
    folder = exported(run, "huggingface")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    torch.testing.assert_close(model(images(16)).pooler_output, backbone(images(16)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "free"),
    [(VIT, False), (SMALL, True)],
    ids=["vit", "cnn"],
)
def test_onnxruntime_computes_the_same_for_any_number_of_images(tmp_path, config, free, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    run, backbone = run_with(tmp_path, config, size=16)
    file = exported(run, "onnx") / "model.onnx"
    assert ("any number and size of images" in capsys.readouterr().out) is free
    session = onnxruntime.InferenceSession(file)
    for count, size in ((1, 16), (5, 16), *([(2, 40)] if free else [])):
        (features,) = session.run(["features"], {"images": images(size, count).numpy()})
        expected = backbone(images(size, count)).detach()
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == [0.5, 0.4, 0.3]
    assert json.loads(about["size"]) == 16

"""A finished backbone's directory comes back, here and with timm alone."""

import json

import pytest
import safetensors.torch
import timm
import torch

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_backbone, save_backbone
from ssl_pipeline.config import ConfigError
from tests.backbones.tiny_vit import TINY_VIT, images, tiny_vit

PREPROCESSING = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT, drop_path=0.1),
        BackboneConfig(name="test_resnet", arguments={"stem_type": ""}, small_images=True),
    ],
)
def test_a_saved_backbone_comes_back(tmp_path, config):
    backbone = create_backbone(config).eval()
    save_backbone(tmp_path, backbone, PREPROCESSING)
    loaded, preprocessing = load_backbone(tmp_path)
    assert torch.equal(loaded.eval()(images()), backbone(images()))
    assert loaded.config == config.model_copy(update={"drop_path": 0.0})
    assert preprocessing == PREPROCESSING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_a_stranger_loads_a_saved_backbone_with_timm_alone(tmp_path):
    backbone = tiny_vit()
    save_backbone(tmp_path, backbone, PREPROCESSING)
    description = json.loads((tmp_path / "backbone.json").read_text())
    model = timm.create_model(description["name"], num_classes=0, **description["arguments"])
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "backbone.safetensors"))
    torch.testing.assert_close(model.eval()(images()), backbone(images()))


def test_an_export_with_a_tag_in_its_name_is_still_read(tmp_path):
    save_backbone(tmp_path, tiny_vit(), PREPROCESSING)
    description = json.loads((tmp_path / "backbone.json").read_text())
    tagged = description | {"name": "vit_tiny_patch16_224.augreg_in21k"}
    (tmp_path / "backbone.json").write_text(json.dumps(tagged))
    assert load_backbone(tmp_path)[0].config.name == "vit_tiny_patch16_224"


def test_a_directory_without_a_backbone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no backbone.json"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not describe a backbone"):
        load_backbone(tmp_path)

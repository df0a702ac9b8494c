"""What is taken, what is left, and what an error says: missing, left over, and what would fit."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from ssl_pipeline.backbones import BackboneConfig, create_backbone, save_backbone
from ssl_pipeline.backbones.weights.layouts import ARCHITECTURES
from ssl_pipeline.config import ConfigError
from tests.backbones.tiny_vit import images, tiny_vit
from tests.backbones.weights import official
from tests.backbones.weights.official import RESNET, RESNET_ARGUMENTS, VIT, random_network
from tests.test_load import PREPROCESSING

LITE0 = Path(__file__).parents[3] / "shared" / "data" / "tf_efficientnet_lite0_in1k.safetensors"
NAME = "vit_tiny_patch16_224"


def write(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def start_from(weights: str, *, name: str = NAME, **more: object):
    return create_backbone(BackboneConfig(**{"name": name, "arguments": VIT, "weights": weights, **more})).eval()


def error_of(weights: str, **more: object) -> str:
    with pytest.raises(ConfigError) as error:
        start_from(weights, **more)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500 + len(weights)
    return text


def test_what_is_taken_and_left_is_told_with_counts(tmp_path):
    own, other = (random_network(NAME, seed, **VIT).state_dict() for seed in (0, 1))
    count = len(own)
    file = write(tmp_path / "dino.pth", official.dino(own, other))
    assert start_from(file).origin.text == (
        f"{file}, took {count} of {2 * count + 5} tensors; "
        f"left: {count} of the student, 4 of the head, 1 of the centre of the loss"
    )
    file = write(tmp_path / "mae.pth", official.mae(own))
    assert start_from(file).origin.text.endswith("left: 5 of the decoder, 1 of the mask token")
    whole = write(tmp_path / "whole.pth", own)
    assert start_from(whole).origin.text == f"{whole}, took {count} of {count} tensors"
    assert len(start_from(whole).origin.sha256) == 64


def test_heads_queue_and_predictor_are_left_by_name(tmp_path):
    own, other = (random_network(RESNET, seed, **RESNET_ARGUMENTS).state_dict() for seed in (0, 1))
    resnet = {"name": RESNET, "arguments": RESNET_ARGUMENTS}
    left = start_from(write(tmp_path / "moco.pth", official.moco_v2(own, other)), **resnet).origin.text
    assert f"left: {len(own)} of the teacher, 4 of the head, 2 of the queue" in left
    left = start_from(write(tmp_path / "swav.pth", official.swav(own)), **resnet).origin.text
    assert "left: 1 of the projector, 1 of the prototypes" in left
    left = start_from(write(tmp_path / "simsiam.pth", official.simsiam(own)), **resnet).origin.text
    assert "left: 2 of the head, 1 of the predictor" in left


def test_a_network_of_another_depth_is_refused(tmp_path):
    deeper = write(tmp_path / "deep.pth", random_network(NAME, **{**VIT, "depth": 3}).state_dict())
    assert "it has unknown blocks.2.attn.proj.bias, blocks.2.attn.proj.weight" in error_of(deeper)
    shallow = write(tmp_path / "shallow.pth", random_network(NAME, **{**VIT, "depth": 1}).state_dict())
    assert "it misses blocks.1.norm1.weight, blocks.1.norm1.bias, " in error_of(shallow)


def test_another_width_names_one_tensor_and_the_number_of_such(tmp_path):
    wider = write(tmp_path / "wide.pth", random_network(NAME, **{**VIT, "embed_dim": 96}).state_dict())
    assert "cls_token must be (1, 1, 48). Got (1, 1, 96), one of " in error_of(wider)


@pytest.mark.parametrize(
    ("there", "asked", "fits"),
    [
        ("resnet18", "resnet34", "It fits resnet18."),
        ("vit_tiny_patch16_224", "resnet18", "It fits deit_tiny_patch16_224, vit_tiny_patch16_224. They"),
        ("resnet18", "vit_tiny_patch16_224", "It fits resnet18."),
        ("resnet18", "efficientnet_lite0", "It fits resnet18."),
        (
            "efficientnet_lite0",
            "resnet18",
            "It fits efficientnet_lite0, tf_efficientnet_lite0. They have the same tensors",
        ),
        ("tf_efficientnet_lite0", "resnet18", "It fits efficientnet_lite0, tf_efficientnet_lite0. They have the same"),
        ("tf_efficientnetv2_s", "resnet18", "It fits efficientnetv2_s, tf_efficientnetv2_s. They"),
        ("mobilenetv3_small_050", "efficientnet_lite0", "It fits mobilenetv3_small_050."),
        ("convnext_atto", "resnet18", "It fits convnext_atto."),
    ],
)
def test_an_error_names_the_architectures_that_would_fit(tmp_path, there, asked, fits):
    file = write(tmp_path / "file.pth", {"state_dict": timm.create_model(there).state_dict()})
    assert fits in error_of(file, name=asked, arguments={})


@pytest.mark.parametrize(
    ("there", "asked", "fits"),
    [
        ((("resnet18", True)), ("resnet34", True), "It fits resnet18 with backbone.small_images=true."),
        ((("resnet18", True)), ("resnet18", False), "It fits resnet18 with backbone.small_images=true."),
        ((("resnet34", False)), ("resnet18", True), "It fits resnet34 with backbone.small_images=false."),
    ],
)
def test_an_error_names_the_stem_that_would_fit(tmp_path, there, asked, fits):
    model = create_backbone(BackboneConfig(name=there[0], small_images=there[1])).model
    file = write(tmp_path / "file.pth", {"state_dict": model.state_dict()})
    with pytest.raises(ConfigError) as error:
        create_backbone(BackboneConfig(name=asked[0], small_images=asked[1], weights=str(file)))
    assert str(error.value).endswith(fits)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"^backbone\.weights=.*no\.safetensors does not exist\. Needed: a file"):
        create_backbone(BackboneConfig(name="resnet18", weights=str(tmp_path / "no.safetensors")))


def test_biases_that_the_network_does_not_have_are_no_loss_in_silence(tmp_path):
    file = write(
        tmp_path / "file.pth", official.dinov3(random_network("vit_small_patch16_dinov3_qkvb", **VIT).state_dict())
    )
    assert "it has unknown blocks.0.attn.q.bias" in error_of(file, name="vit_small_patch16_dinov3")


def test_a_norm_on_the_other_side_of_pooling_names_the_argument(tmp_path):
    file = write(tmp_path / "mae.pth", official.mae(random_network(NAME, **VIT).state_dict()))
    assert "try backbone.arguments.global_pool=token." in error_of(file, arguments={**VIT, "global_pool": "avg"})
    pooled = random_network(NAME, **VIT, global_pool="avg")
    file = write(tmp_path / "pooled.pth", pooled.state_dict())
    assert "try backbone.arguments.global_pool=avg." in error_of(file)
    backbone = start_from(file, arguments={**VIT, "global_pool": "avg"})
    torch.testing.assert_close(backbone(images()), pooled(images()))


@pytest.mark.parametrize(
    ("content", "asked", "sentence"),
    [
        ("plain", "teacher", "holds no teacher, but a network of no such name. Leave weights_from out"),
        ("teacher alone", "student", "holds no student, but a teacher"),
        ("plain", "exponential", "must be teacher or student for a file. Got 'exponential'"),
    ],
)
def test_a_network_that_the_file_does_not_have_is_refused(tmp_path, content, asked, sentence):
    own = random_network(NAME, **VIT).state_dict()
    file = write(tmp_path / "file.pth", own if content == "plain" else {"teacher": own})
    assert sentence in error_of(file, weights_from=asked)


@pytest.mark.parametrize(
    ("layout", "table", "lost", "wanted", "other"),
    [
        (official.dino, "teacher", "backbone.blocks.1.mlp.fc1.bias", "teacher", "student"),
        (official.ibot, "teacher", "module.backbone.blocks.1.mlp.fc1.bias", "teacher", "student"),
        (official.moco_v3_vit, "state_dict", "module.base_encoder.blocks.1.mlp.fc1.bias", "student", "teacher"),
    ],
)
def test_a_network_that_lacks_a_tensor_is_not_replaced_by_the_other(tmp_path, layout, table, lost, wanted, other):
    own, others = (random_network(NAME, seed, **VIT).state_dict() for seed in (0, 1))
    content = layout(own, others)
    del content[table][lost]
    file = write(tmp_path / "file.pth", content)
    assert "it misses blocks.1.mlp.fc1.bias (1 in all)" in error_of(file)
    assert "it misses blocks.1.mlp.fc1.bias (1 in all)" in error_of(file, weights_from=wanted)
    assert start_from(file, weights_from=other).origin.text.startswith(f"{file}, took {len(own)} of")


def test_which_network_needs_weights_and_no_tag():
    with pytest.raises(ValueError, match=r"weights_from=teacher chooses a network of backbone.weights"):
        BackboneConfig(name=NAME, weights_from="teacher")
    with pytest.raises(ConfigError, match=r"'a1_in1k' is a tag of timm; leave weights_from out"):
        create_backbone(BackboneConfig(name="resnet18", weights="a1_in1k", weights_from="teacher"))


def test_the_settings_in_an_official_checkpoint_are_read_as_data(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="vit"))
    config.__dict__["frozen"] = True
    network = random_network(NAME, **VIT)
    file = write(tmp_path / "simmim.pth", official.simmim(network.state_dict()) | {"config": config})
    monkeypatch.delitem(sys.modules, "yacs.config")
    torch.testing.assert_close(start_from(file)(images()), network(images()))


def test_a_half_precision_file_fills_a_network_of_full_precision(tmp_path):
    network = random_network(NAME, **VIT)
    half = {name: tensor.half() for name, tensor in network.state_dict().items()}
    backbone = start_from(write(tmp_path / "half.pth", half), arguments={**VIT, "img_size": 48})
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def quantised(value: torch.Tensor) -> torch.Tensor:
    return (value * 100).to(torch.int8)


def with_one(number: float, dtype: torch.dtype = torch.float32):
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.to(dtype)
        value.view(-1)[7] = number
        return value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (quantised, "is int8"),
        (lambda value: value.to(torch.complex64), "is complex64"),
        (lambda value: value.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (with_one(float("nan")), "is not finite"),
        (with_one(float("-inf"), torch.bfloat16), "is not finite"),
        (with_one(1e300, torch.float64), "is not finite"),  # in float32
    ],
)
def test_weights_that_are_no_finite_floats_are_refused_by_name(tmp_path, change, said):
    state = dict(random_network(RESNET, **RESNET_ARGUMENTS).state_dict())
    name = next(name for name in state if name.endswith("conv2.weight"))
    changed = {f"module.{own}": change(value) if own == name else value for own, value in state.items()}
    text = error_of(write(tmp_path / "w.pth", changed), name=RESNET, arguments=RESNET_ARGUMENTS)
    assert f"module.{name} {said}" in text


def test_a_part_of_what_is_joined_has_the_name_that_the_file_gives_it(tmp_path):
    state = official.hugging_face_vit(random_network(NAME, **VIT).state_dict())
    name = next(name for name in state if name.endswith("key.weight"))
    text = error_of(write(tmp_path / "w.pth", dict(state) | {name: with_one(float("nan"))(state[name])}))
    assert f"{name} is not finite" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_and_whole_numbers_that_count_are_taken(tmp_path, dtype):
    state = random_network(RESNET, **RESNET_ARGUMENTS).state_dict()
    wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    assert {value.dtype for value in wide.values()} == {dtype, torch.int64}  # batch norm's counters
    file = write(tmp_path / "w.pth", wide)
    taken = start_from(file, name=RESNET, arguments=RESNET_ARGUMENTS)
    assert taken.origin.text.endswith(f"took {len(wide)} of {len(wide)} tensors")


def test_what_is_left_in_a_file_may_be_anything(tmp_path):
    state = random_network(RESNET, **RESNET_ARGUMENTS).state_dict()
    head = {"fc.weight": torch.full((3, 4), float("nan")), "fc.bias": torch.zeros(3, dtype=torch.int8)}
    assert (
        "2 of the head"
        in start_from(write(tmp_path / "w.pth", state | head), name=RESNET, arguments=RESNET_ARGUMENTS).origin.text
    )


def test_nothing_is_changed_by_a_file_that_does_not_fit(tmp_path):
    from ssl_pipeline.backbones.weights import load_weights

    model = random_network(NAME, **VIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="does not fit"):
        load_weights(model, random_network(NAME, 1, **{**VIT, "depth": 1}).state_dict(), source="x")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Runs


def test_a_finished_run_is_a_source_of_weights(tmp_path):
    backbone = tiny_vit()
    save_backbone(tmp_path / "run", backbone, PREPROCESSING)
    start = start_from(str(tmp_path / "run"))
    torch.testing.assert_close(start(images()), backbone(images()))
    assert start.origin.text.startswith(f"{tmp_path}/run/backbone.safetensors, took ")
    larger = start_from(str(tmp_path / "run"), arguments={**VIT, "img_size": 48})
    assert larger.model.pos_embed.shape == (1, 37, 48)


def test_a_directory_of_hugging_face_is_a_source_of_weights(tmp_path):
    network = random_network(NAME, **VIT)
    tensors = official.hugging_face_vit(network.state_dict())
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    torch.testing.assert_close(start_from(str(tmp_path))(images()), network(images()))


def test_a_directory_without_weights_is_refused(tmp_path):
    assert "is a directory without weights: it has no checkpoints of a run, and no file" in error_of(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert "has no backbone.safetensors, which pretraining writes when it ends" in error_of(str(tmp_path))


# Real files


@pytest.mark.skipif(not LITE0.exists(), reason=f"needs {LITE0.name} in shared/data")
def test_the_weights_of_a_real_network_are_loaded():
    backbone = start_from(str(LITE0), name="tf_efficientnet_lite0", arguments={})
    own = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    tensors = safetensors.torch.load_file(LITE0)
    own.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")})
    image = images(64)
    torch.testing.assert_close(backbone(image), own(image), rtol=1e-3, atol=1e-4)
    assert "left: 2 of the head" in backbone.origin.text


def test_the_architectures_that_are_tried_have_the_stems_that_they_are_listed_by():
    for stem, names in ARCHITECTURES.items():
        if stem[-1] > 7:
            continue  # large ViTs, whose names tell their patches
        name = names[0]  # one of each: all would take long
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        assert stem in {tuple(value.shape) for value in model.state_dict().values()}, name

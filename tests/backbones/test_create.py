"""Backbones from their config: stems, checkpointed activations, weights in files, and mistakes."""

import copy
import hashlib
import math

import pytest
import safetensors.torch
import timm
import torch

from ssl_pipeline.backbones import BackboneConfig, create_backbone, outline_backbone
from ssl_pipeline.backbones.positions import resample_positions
from ssl_pipeline.backbones.weights import sources, to_be_fetched
from ssl_pipeline.config import ConfigError, validate
from tests.backbones.tiny_vit import images, tiny_vit


def test_small_images_change_the_stem_of_a_resnet():
    backbone = create_backbone(BackboneConfig(name="resnet18", small_images=True))
    stem = backbone.model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert abs(stem.weight.std().item() - math.sqrt(2 / (64 * 9))) < 0.005
    assert backbone.model.forward_features(images()).shape == (2, 512, 4, 4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18d", "convnext_atto"])
def test_small_images_are_refused_where_there_is_no_such_stem(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not one"):
        create_backbone(BackboneConfig(name=name, small_images=True))


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_a_backbone_keeps_the_config_that_makes_another_one(name):
    config = BackboneConfig(name=name, drop_path=0.1)
    with torch.device("meta"):
        backbone = create_backbone(config)
        another = create_backbone(copy.deepcopy(backbone).config)
    assert backbone.config == another.config == config
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (backbone, another)]
    assert shapes[0] == shapes[1]


def step_of(**changes):
    """Features and gradients of a training step with drop path, and the tokens that the step keeps for its backward."""
    backbone, kept = tiny_vit(drop_path=0.5, **changes).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        torch.manual_seed(1)
        features = backbone(images(count=8))
    features.square().sum().backward()
    return features.detach(), [parameter.grad for parameter in backbone.parameters()], sum(kept)


def test_checkpointed_activations_change_nothing_but_the_memory():
    features, gradients, kept = step_of()
    checkpointed_features, checkpointed_gradients, kept_then = step_of(checkpoint_activations=True)
    assert torch.equal(checkpointed_features, features)
    torch.testing.assert_close(checkpointed_gradients, gradients, rtol=0, atol=1e-7)
    assert kept_then < kept / 3


def test_a_cnn_without_batch_norm_can_checkpoint_its_activations():
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        backbone = create_backbone(BackboneConfig(name="test_convnext", checkpoint_activations=checkpoint))
        assert any(getattr(part, "grad_checkpointing", False) for part in backbone.modules()) == checkpoint
        backbone(images(32)).sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["test_resnet", "wide_resnet28_2"])
def test_batch_norm_and_checkpointed_activations_are_refused(name):
    with pytest.raises(ConfigError, match=f"needs a network without batch norm.* '{name}' has batch norm"):
        create_backbone(BackboneConfig(name=name, checkpoint_activations=True))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"name": "resnet81"}, r"No timm model 'resnet81'. Did you mean 'resnet\d+"),
        (
            {"name": "resnet18", "arguments": {"depht": 3}},
            "timm cannot create 'resnet18' with backbone.arguments depht=3: .*unexpected",
        ),
        (
            {"name": "resnet18", "weights": "no_such_tag"},
            "no file, run or pretrained 'resnet18.no_such_tag'. Known: .*resnet18.a1_in1k",
        ),
        (
            {"name": "mixer_s32_224", "arguments": {"dynamic": 3}},
            r"got an unexpected keyword argument 'dynamic'\. .*=null",
        ),
        ({"name": "vit_tiny_patch16_224", "arguments": {"global_pool": "mean"}}, "timm cannot create 'vit_tiny"),
        ({"name": "vgg11", "drop_path": 0.1}, r"'drop_path_rate'\. Set backbone\.drop_path=0\."),
        ({"name": "resnet18", "weights": "missing.safetensors"}, "backbone.weights=missing.safetensors does not exist"),
        ({"name": "resnet18", "weights": "a1_in1k", "small_images": True}, "Leave backbone.weights out"),
    ],
)
def test_a_mistake_is_one_line(config, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        create_backbone(BackboneConfig(**config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"name": "resnet18.a1_in1k"},
            r"without a tag .* Got 'resnet18\.a1_in1k'; write backbone\.name=resnet18 backbone\.weights=a1_in1k$",
        ),
        ({"arguments": {"in_chans": 1}}, r"in_chans must be 3, .* Got 1; leave it out"),
        ({"arguments": {"global_pool": ""}}, r"global_pool must give one vector .* Got ''; leave it out, or try avg"),
        ({"arguments": {"global_pool": False}}, r"global_pool must give one vector .* Got 'False'"),
        ({"arguments": {"global_pool": "catavgmax"}}, r"global_pool must give one vector of the network's width"),
        ({"arguments": {"features_only": True}}, r"must not hold 'features_only': a backbone gives one vector"),
    ],
)
def test_what_no_backbone_can_be_is_told_before_it_is_built(config, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        validate(BackboneConfig, {"name": "resnet18", **config})
    assert "\n" not in str(error.value)


def test_a_backbone_says_where_its_weights_come_from(tmp_path):
    assert str(create_backbone(BackboneConfig(name="resnet18")).origin) == "random initialisation"
    safetensors.torch.save_file(weights_of(tiny_vit()), tmp_path / "weights.safetensors")
    digest = hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()
    origin = start_from(tmp_path / "weights.safetensors").origin
    count = len(weights_of(tiny_vit()))
    assert str(origin) == f"{tmp_path}/weights.safetensors, took {count} of {count} tensors; SHA-256 {digest[:16]}"
    assert origin.sha256 == digest


@pytest.mark.parametrize("weights", ["a1_in1k", "resnet18.a1_in1k"])
def test_what_is_fetched_is_said_before_and_a_way_out_with_the_error(monkeypatch, tmp_path, capsys, weights):
    def unreachable(*_, **__):
        assert "note: fetching the weights resnet18.a1_in1k from timm/resnet18.a1_in1k" in capsys.readouterr().err
        raise ConnectionError("no route to that host.\nmore")

    monkeypatch.setattr(timm, "create_model", unreachable)
    told = r"^The weights resnet18.a1_in1k cannot be fetched: no route to that host.* set backbone\.weights=FILE"
    with pytest.raises(ConfigError, match=told):
        create_backbone(BackboneConfig(name="resnet18", weights=weights))


def test_nothing_is_said_of_weights_that_are_here_already(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda place, file: str(tmp_path) if "bin" in file else None)
    assert to_be_fetched("resnet18.a1_in1k") is None
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda place, file: object())  # known not to be there
    assert to_be_fetched("resnet18.a1_in1k") == "timm/resnet18.a1_in1k of timm's hub"


def test_the_weights_of_a_tag_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: asked.append(name) or timm_model())
    backbone = create_backbone(BackboneConfig(name="resnet18", weights="a1_in1k"))
    assert asked == ["resnet18.a1_in1k"]
    assert str(backbone.origin) == "timm's resnet18.a1_in1k"


def timm_model():
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0)


def test_arguments_with_a_setting_of_their_own_are_refused():
    with pytest.raises(ValueError, match="must not hold 'num_classes'"):
        BackboneConfig(name="resnet18", arguments={"num_classes": 10})


def weights_of(backbone):
    return dict(backbone.model.state_dict())


def start_from(path, **changes):
    return tiny_vit(weights=str(path), **changes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_classifier_file_are_loaded_without_the_classifier(tmp_path, suffix):
    backbone = tiny_vit()
    torch.nn.init.normal_(backbone.model.cls_token)
    weights = {**weights_of(backbone), "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": weights}, path)
    else:
        safetensors.torch.save_file(weights, path)
    torch.testing.assert_close(start_from(path)(images()), backbone(images()))


def test_a_position_table_of_another_size_is_resampled(tmp_path):
    backbone = tiny_vit()
    torch.save(weights_of(backbone), tmp_path / "weights.pth")
    larger = start_from(tmp_path / "weights.pth", arguments={"img_size": 48})
    positions = backbone.model.pos_embed
    torch.testing.assert_close(larger.model.pos_embed[:, 0], positions[:, 0])
    torch.testing.assert_close(larger.model.pos_embed[:, 1:], resample_positions(positions[:, 1:], (4, 4), (6, 6)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: [w.pop(name) for name in list(w)[:5]], r"misses cls_token, pos_embed, .* \(5 in all\)"),
        (lambda w: w.update({"extra.weight": torch.ones(1)}), r"has unknown extra.weight \(1 in all\)"),
        (lambda w: w.update({"norm.bias": torch.ones(3)}), r"norm.bias must be \(48,\). Got \(3,\)"),
        (lambda w: w.clear(), "does not hold tensors by name: there is no tensor in it"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, sentence):
    weights = weights_of(tiny_vit())
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=sentence):
        start_from(tmp_path / "weights.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"weights": BackboneConfig(name="resnet18")}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="cannot read weights") as error:
        start_from(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: b"", "it is empty (0 bytes). Copy it again."),
        (lambda content: content[: len(content) // 2], "it is truncated or damaged, or not a {kind}. Copy it again."),
        (lambda content: content[:40], "it is truncated or damaged, or not a {kind}. Copy it again."),
        (
            lambda content: b"\n<!doctype html><title>404</title>",
            "it is a web page, not weights. Download the weights again",
        ),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Fetch them: git lfs pull."),
    ],
)
def test_a_damaged_file_of_weights_is_told_in_our_words(tmp_path, suffix, change, sentence):
    path = tmp_path / f"cut{suffix}"
    whole = tiny_vit()
    save(whole, path) if suffix == ".safetensors" else torch.save(weights_of(whole), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError) as error:
        start_from(path)
    kind = "PyTorch checkpoint" if suffix == ".pt" else "safetensors file"
    assert str(error.value).startswith(f"cannot read weights from {path}: ")
    assert sentence.format(kind=kind) in str(error.value)


def test_a_file_of_the_other_kind_names_its_ending(tmp_path):
    save(tiny_vit(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"it is a safetensors file\. Name it \.safetensors\.$"):
        start_from(tmp_path / "a.pth")
    torch.save(weights_of(tiny_vit()), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"it is a PyTorch checkpoint\. Name it \.pt\.$"):
        start_from(tmp_path / "a.safetensors")


@pytest.mark.parametrize("hub", ["timm/", "hf-hub:timm/", "hf_hub:timm/", "https://huggingface.co/timm/"])
def test_a_name_as_on_the_hub_is_answered_with_one_that_is_taken(hub):
    with pytest.raises(ValueError, match=r"write backbone\.name=resnet18 backbone\.weights=a1_in1k\b"):
        BackboneConfig(name=f"{hub}resnet18.a1_in1k")
    with pytest.raises(ValueError, match=r"write backbone\.name=resnet18(?!\S)"):
        BackboneConfig(name=f"{hub}resnet18")
    BackboneConfig(name="resnet18", weights="a1_in1k")
    with pytest.raises(ConfigError, match=r"timm's own are backbone\.weights=resnet18\.a1_in1k\.$"):
        create_backbone(BackboneConfig(name="resnet18", weights=f"{hub}resnet18.a1_in1k"))


def save(backbone, path):
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights_of(backbone).items()}, path)


def test_frozen_batch_norm_keeps_the_statistics_of_the_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    began = create_backbone(BackboneConfig(name="test_resnet"))
    save(began, path)
    backbone = create_backbone(BackboneConfig(name="test_resnet", weights=str(path), frozen_batch_norm=True))
    backbone.eval().train()
    shown = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 3
    features = backbone(shown)
    features.sum().backward()
    assert torch.equal(features, began.eval()(shown))
    assert torch.equal(backbone.model.bn1.running_mean, torch.zeros(32))
    assert backbone.model.bn1.weight.grad is not None  # scale and shift are trained all the same


def test_frozen_statistics_need_weights_and_batch_norm(tmp_path):
    with pytest.raises(ValueError, match=r"Set backbone\.weights too"):
        BackboneConfig(name="test_resnet", frozen_batch_norm=True)
    path = tmp_path / "weights.safetensors"
    save(create_backbone(BackboneConfig(name="test_convnext")), path)
    with pytest.raises(ConfigError, match="'test_convnext' has none"):
        create_backbone(BackboneConfig(name="test_convnext", weights=str(path), frozen_batch_norm=True))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "resnet81"}, "No timm model 'resnet81'"),
        ({"name": "resnet18", "weights": "in2k"}, "run or pretrained 'resnet18.in2k'"),
        ({"name": "resnet18", "weights": "no.pth"}, "backbone.weights=no.pth does not exist"),
        (
            {"name": "resnet18", "weights": "{folder}"},
            r"^backbone\.weights=.* is a directory without weights: .* no file called backbone\.safetensors, ",
        ),
        ({"name": "resnet18", "weights": "{file}"}, "does not fit: .* It fits test_resnet"),
        ({"name": "resnet18", "arguments": {"patch_size": 8}}, "timm cannot create 'resnet18'"),
        ({"name": "convnext_atto", "small_images": True}, "small_images needs a ResNet"),
        ({"name": "resnet18", "class_tokens": 4}, "class_tokens needs a ViT"),
    ],
)
def test_an_outline_tells_what_the_network_itself_would(tmp_path, settings, sentence):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "file.pth")
    if "weights" in settings:
        settings = settings | {"weights": settings["weights"].format(file=tmp_path / "file.pth", folder=tmp_path)}
    config, told = validate(BackboneConfig, settings), []
    for create in (create_backbone, outline_backbone):
        with pytest.raises(ConfigError, match=sentence) as error:
            create(config)
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.filterwarnings("error")
def test_an_outline_has_no_memory_and_fetches_nothing(tmp_path, monkeypatch):
    created = timm.create_model
    torch.save(created("test_resnet").state_dict(), tmp_path / "file.pth")

    def create_model(name, pretrained=False, **more):
        assert not pretrained
        return created(name, pretrained, **more)

    monkeypatch.setattr(timm, "create_model", create_model)
    for name, weights in (("resnet18", "a1_in1k"), ("test_resnet", str(tmp_path / "file.pth"))):
        backbone = outline_backbone(validate(BackboneConfig, {"name": name, "weights": weights}))
        assert all(parameter.is_meta for parameter in backbone.parameters())

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.methods import build_method
from ssl_pipeline.training.preflight import check_batch_norm, check_precision, evaluation_size, run_facts
from ssl_pipeline.training.run import TrainConfig
from tests.tiny import CNN, CONFIGS, make_method, tiny_settings

DATA = {"shards": "a", "batch_size": 8}


def labelled(labels: list[int]) -> ShardIndex:
    index = Mock(spec=ShardIndex, class_names=None, num_soft_classes=None, called="few")
    index.labels.return_value = np.array(labels)
    index.__len__ = lambda self: len(labels)
    return index


def test_labels_that_are_identifiers_make_no_classifier_of_billions():
    data = validate(DataConfig, DATA)
    assert run_facts(labelled([7]), labelled([0, 40, 2]), {}, data, global_batch=8).num_classes == 41
    with pytest.raises(ConfigError, match="The 2 labelled images in few have labels up to 3,000,000,000; labels must"):
        run_facts(labelled([7]), labelled([5, 3_000_000_000]), {}, data, global_batch=8)


@pytest.mark.parametrize(
    ("labels", "names", "named"),
    [
        ([1, 1, 1], ("cat", "dog", "owl"), r" \(dog\)"),
        ([4, 4], None, r" \(4\)"),
        ([[0.0, 1.0], [0.0, 0.5]], ("cat", "dog"), r" \(dog\)"),
    ],
)
def test_labelled_images_of_one_class_are_refused_however_many_are_named(labels, names, named):
    index = labelled(labels)
    index.class_names = names
    index.num_soft_classes = None if index.labels().ndim == 1 else 2
    data = validate(DataConfig, DATA)
    with pytest.raises(ConfigError, match=rf"labelled images in few are all of one class{named}; there must be two"):
        run_facts(labelled([7]), index, {}, data, global_batch=8)


def test_views_of_which_one_pixel_is_left_are_refused_where_gradients_would_be_wrong():
    method = make_method("simclr", backbone=CNN)
    views, cpu = {"view": ViewGroup(count=2, size=3)}, torch.device("cpu")
    sentence = r"augment\.view\.size=3 is too small for 'test_resnet' with train\.precision=bf16 on a CPU: .*layer4.*=5"
    with pytest.raises(ConfigError, match=sentence):
        check_precision(method, method.backbone, views, TrainConfig(steps=1, precision="bf16"), cpu)
    check_precision(
        method, method.backbone, {"view": ViewGroup(count=2, size=5)}, TrainConfig(steps=1, precision="bf16"), cpu
    )
    check_precision(method, method.backbone, views, TrainConfig(steps=1), cpu)
    check_precision(method, method.backbone, views, TrainConfig(steps=1, precision="bf16"), torch.device("cuda"))


def test_precision_is_checked_before_classes_are_known():
    config = CONFIGS["fixmatch"](**tiny_settings("fixmatch") | {"num_classes": None})
    backbone = create_backbone(CNN)
    method = build_method(config, backbone)
    views = {"weak": ViewGroup(size=3), "strong": ViewGroup(size=16)}
    with pytest.raises(ConfigError, match=r"augment\.weak\.size=3 is too small"):
        check_precision(method, backbone, views, TrainConfig(steps=1, precision="bf16"), torch.device("cpu"))


@pytest.mark.parametrize(("sync", "processes"), [(False, 1), (False, 2), (True, 1)])
def test_batch_norm_of_one_image_is_refused(sync: bool, processes: int):
    data, train = validate(DataConfig, {**DATA, "batch_size": 1}), TrainConfig(steps=1, sync_batch_norm=sync)
    with pytest.raises(
        ConfigError, match=r"^SimCLR with test_resnet has batch norm, .* Got data\.batch_size=1; raise it"
    ):
        check_batch_norm(make_method("simclr", backbone=CNN), data, train, num_processes=processes)


def test_batch_norm_over_processes_and_networks_without_take_one_image_each():
    data, train = validate(DataConfig, {**DATA, "batch_size": 1}), TrainConfig(steps=1, sync_batch_norm=True)
    check_batch_norm(make_method("simclr", backbone=CNN), data, train, num_processes=2)
    check_batch_norm(make_method("dino"), data, train, num_processes=1)


def test_evaluators_show_images_of_the_evaluated_group_at_its_largest_size():
    weak, strong = ViewGroup(size=(16, 24), size_weights=(1.0, 1.0)), ViewGroup(size=32)
    assert evaluation_size(make_method("fixmatch"), {"strong": strong, "weak": weak}) == 24
    assert evaluation_size(make_method("dino"), {"local": ViewGroup(size=8), "global": strong}) == 32

"""FixMatch against its update rules, written out; and the whole run on two streams."""

import io
import json
import math
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.fixmatch import FixMatch, FixMatchConfig
from ssl_pipeline.optim.optimizer import build_optimizer, write_values
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import ToyBackbone, assert_same_tensors, copies, descend, toy_method
from tests.tiny import write_shards

NAME = "cifar10_fixmatch_wrn28_2"
START = Progress(0, 10, 5)


def fixmatch(**changes):
    settings = {"num_classes": 3, "threshold": 0.4, "unlabelled_weight": 0.7} | changes
    return toy_method(FixMatch, FixMatchConfig(name="fixmatch", **settings))


def batch_of(num_labelled=4, num_unlabelled=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def views(count):
        return torch.randn(1, count, 3, 2, 2, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, 3, (num_labelled + num_unlabelled,), generator=generator)
    labelled = Batch({"weak": views(num_labelled)}, labels[:num_labelled], torch.arange(num_labelled))
    unlabelled = {"weak": views(num_unlabelled), "strong": views(num_unlabelled)}
    return Batch(unlabelled, labels[num_labelled:], torch.arange(num_unlabelled), labelled=labelled)


def test_the_loss_is_that_of_one_pass_over_all_three_parts():
    method, batch = fixmatch(threshold=0.5), batch_of()
    student = copies(method.pair.student)
    parts = [batch.labelled.views["weak"][0], batch.views["weak"][0], batch.views["strong"][0]]
    logits = student(torch.cat(parts))
    expected = sum(-logits[i].log_softmax(0)[batch.labelled.labels[i]] for i in range(4)) / 4
    kept = 0
    for i in range(6):
        weak, strong = logits[4 + i].softmax(0).detach(), logits[10 + i].log_softmax(0)
        if weak.max() >= 0.5:
            kept += 1
            expected = expected - 0.7 * strong[weak.argmax()] / 6
    assert 0 < kept < 6
    output = method(batch, START)
    assert_close(output.loss, expected)
    assert output.metrics["kept"].item() == pytest.approx(kept / 6)
    assert_same_tensors(method.pair.student, student)  # the statistics too

    output.loss.backward()
    expected.backward()
    for own, theirs in zip(method.pair.student.parameters(), student.parameters(), strict=True):
        assert_close(own.grad, theirs.grad)


def test_batch_norm_sees_one_distribution():
    """In three passes the labelled images would be normalised on their own."""
    method, batch = fixmatch(), batch_of()
    parts = [batch.labelled.views["weak"][0], batch.views["weak"][0], batch.views["strong"][0]]
    logits = torch.cat([method.pair.student(part) for part in parts])
    supervised = F.cross_entropy(logits[:4], batch.labelled.labels)
    method.config = method.config.model_copy(update={"unlabelled_weight": 0.0})
    assert abs(method(batch, START).loss - supervised) > 1e-3


def test_labels_of_unlabelled_images_change_metrics_alone():
    method, batch = fixmatch(threshold=0.0), batch_of()
    unknown = Batch(batch.views, torch.full((6,), -1), batch.sample_ids, labelled=batch.labelled)
    with_labels, without = method(batch, START), method(unknown, START)
    assert torch.equal(with_labels.loss, without.loss)
    assert without.metrics["kept_right"] == 0
    guesses = copies(method.pair.student)(
        torch.cat([batch.labelled.views["weak"][0], batch.views["weak"][0], batch.views["strong"][0]])
    )[4:10].argmax(dim=1)
    assert with_labels.metrics["kept_right"].item() == pytest.approx((guesses == batch.labels).double().mean().item())


def test_the_moving_average_follows_the_weights_after_the_step_and_copies_statistics():
    method = fixmatch(teacher_momentum=Schedule(value=0.9))
    assert_same_tensors(method.pair.teacher.network, method.pair.student)
    expected = copies(method.pair.student)
    for step in range(3):
        output = method(batch_of(seed=step), Progress(step, 10, 5))
        method.zero_grad()
        output.loss.backward()
        descend(method, 0.1)
        method.after_step([output.carry], Progress(step, 10, 5))
        with torch.no_grad():
            for own, new in zip(expected.parameters(), method.pair.student.parameters(), strict=True):
                own.copy_(0.9 * own + 0.1 * new)
            for own, new in zip(expected.buffers(), method.pair.student.buffers(), strict=True):
                own.copy_(new)
    assert_same_tensors(method.pair.teacher.network, expected)
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("pair.student.") for name in trained)


def test_what_is_evaluated_is_the_moving_average():
    method = fixmatch()
    with torch.no_grad():
        for parameter in method.pair.student.parameters():
            parameter.zero_()
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method.eval()
    with torch.no_grad():
        scores = method.classifier(method.backbone(images))
        assert torch.equal(scores, method.pair.teacher(images))
    assert scores.std() > 0
    assert method.classifier.out_features == scores.shape[1] == 3


def test_without_a_number_the_classes_are_those_of_the_labelled_images():
    torch.manual_seed(0)
    method = FixMatch(FixMatchConfig(name="fixmatch"), ToyBackbone())
    method.prepare(RunFacts(6, 4, 6, {"weak": (2,), "strong": (2,)}, (0.5,) * 3, (0.5,) * 3))
    assert method.double()(batch_of(), START).loss.isfinite()
    assert method.classifier.out_features == 4


# The recipe


def recipe(*argv):
    return load(PretrainConfig, [f"recipe={NAME}", *argv], recipes=RECIPES)


def test_the_recipe_has_the_official_numbers():
    config = recipe()
    assert config.method == FixMatchConfig(
        name="fixmatch",
        num_classes=10,
        threshold=0.95,
        unlabelled_weight=1.0,
        teacher_momentum=Schedule(value=0.999),
    )
    assert (config.data.batch_size, config.data.labelled.batch_size) == (7 * 64, 64)
    assert (config.train.steps, config.train.accumulate) == (2**20, 1)
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov, optim.clip_norm) == ("sgd", 0.9, True, None)
    assert (optim.weight_decay.value, optim.weight_decay.final, optim.weight_decay_on) == (5e-4, None, "matrices")
    lr = optim.effective_lr(448)
    for done in (0, 0.25, 1):
        progress = Progress(round(done * 2**20), 2**20, 50_000 / 448)
        assert lr(progress) == pytest.approx(0.03 * math.cos(7 * math.pi * done / 16))
    weak, strong = config.augment["weak"], config.augment["strong"]
    for group in (weak, strong):
        assert (group.count, group.size, group.crop, group.padding, group.flip_prob) == (1, 32, "pad", 0.125, 0.5)
        assert (group.jitter_prob, group.gray_prob, group.blur_prob, group.solarize_prob) == (0, 0, 0, 0)
    assert (weak.rand_augment, weak.cutout) == (0, (0, 0))
    assert (strong.rand_augment, strong.cutout) == (2, (0.5, 0.5))


def test_decay_is_on_kernels_alone_and_equals_half_their_squares_in_the_loss():
    config = recipe()
    method = build_method(config.method, create_backbone(config.backbone))
    optimizer = build_optimizer(method, config.optim)
    progress = Progress(3, 10, 5)
    lr = write_values(optimizer, config.optim, config.optim.effective_lr(448), progress)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in method.named_parameters():
        assert (id(parameter) in decayed) == (
            parameter.requires_grad and name.endswith("weight") and parameter.ndim > 1
        )

    weight, norm = method.pair.student.head.weight, method.pair.student.backbone.model.norm.weight
    before, norm_before = weight.detach().clone(), norm.detach().clone()
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the first Nesterov step goes by (1 + momentum) times the gradient, 5e-4 * weight
    assert_close(weight.detach(), before * (1 - lr * 1.9 * 5e-4))
    assert torch.equal(norm.detach(), norm_before)


# Whole runs: two streams, the loop, checkpoints, the monitor


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "unlabelled", (20, 17, 11))


@pytest.fixture
def labelled(tmp_path):
    return write_shards(tmp_path / "labelled", (5,))


def settings(shards, labelled, output, *more):
    small = ["backbone.name=test_resnet", "backbone.arguments.stem_type=''", "train.precision=no", "train.log_every=1"]
    sizes = ["augment.weak.size=32", "augment.strong.size=32", "method.num_classes=3", "method.threshold=0.34"]
    read = [f"data.shards={shards}", "data.batch_size=8", "data.workers=0", "knn=null", "train.steps=4"]
    given = [f"data.labelled.shards={labelled}", "data.labelled.batch_size=6", f"classifier.val={shards}"]
    chosen = {item.partition("=")[0]: item for item in [*small, *sizes, *read, *given, f"output={output}", *more]}
    if "data.labelled" in chosen:
        chosen = {key: item for key, item in chosen.items() if not key.startswith("data.labelled.")}
    if "classifier" in chosen:
        chosen.pop("classifier.val")
    return recipe(*chosen.values())


@contextmanager
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run(config):
    with fresh_accelerator():
        assert pretrain(config) == 0
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path):
    return Checkpoints(output / "checkpoints").load_latest().tensors["method"]


@pytest.mark.slow
def test_a_run_with_fewer_labels_than_a_batch_trains_and_resumes_exactly(tmp_path, shards, labelled, capfd):
    every = ["classifier.every=2", "train.save_every=2"]
    straight = run(settings(shards, labelled, tmp_path / "straight", *every))
    assert [row["step"] for row in straight] == [1, 2, 3, 4]
    assert {"kept", "kept_right", "labelled_accuracy", "feature_std"} <= straight[0].keys()
    assert ["classifier_top1" in row for row in straight] == [False, True, False, True]
    assert all(math.isfinite(value) for row in straight for value in row.values())
    assert ": 6 with each global batch" in capfd.readouterr().out

    resumed = tmp_path / "resumed"
    run(settings(shards, labelled, resumed, *every, "train.steps=2", "optim.lr.decay=linear", "optim.lr.final=0.03"))
    first = run(settings(shards, labelled, tmp_path / "four", "optim.lr.decay=linear", "optim.lr.final=0.03"))
    second = run(settings(shards, labelled, resumed, "optim.lr.decay=linear", "optim.lr.final=0.03"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    for name, tensor in weights(tmp_path / "four").items():
        assert torch.equal(tensor, weights(resumed)[name]), name


@pytest.mark.other
def test_the_monitor_measures_the_moving_averages_classifier(tmp_path, shards, labelled):
    config = settings(shards, labelled, tmp_path / "run", "classifier.every=4")
    last = run(config)[-1]
    method = build_method(config.method, create_backbone(config.backbone))
    method.load_state_dict(weights(tmp_path / "run"))
    method.eval()
    images = EvaluationSet(open_shards(shards), 32)
    pixels = torch.stack([images[number][0] for number in range(48)])
    labels = torch.tensor([images[number][1] for number in range(48)])
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.data.mean, config.data.std))
    with torch.no_grad():
        right = method.pair.teacher((pixels / 255 - mean) / std).argmax(dim=1) == labels
    assert last["classifier_top1"] == pytest.approx(100 * right.float().mean().item())
    assert last["classifier_top5"] == 100


def refusal(config):
    with fresh_accelerator(), pytest.raises(ConfigError) as error:
        pretrain(config)
    assert not (config.output / "checkpoints").exists()
    return str(error.value)


def test_labelled_images_are_required(tmp_path, shards, labelled):
    config = settings(shards, labelled, tmp_path / "run", "data.labelled=null")
    assert refusal(config) == (
        "FixMatch needs labelled images: set data.labelled.shards=DIR (python -m data_tools.split_labels makes them)."
    )


def test_labels_must_be_there_and_fit_the_classes(tmp_path, shards, labelled):
    assert refusal(settings(shards, labelled, tmp_path / "few", "method.num_classes=2")) == (
        "method.num_classes must be the number of classes of the labelled images, 3. Got 2; "
        "method.num_classes=null takes theirs."
    )
    bare = write_bare(tmp_path / "bare")
    assert refusal(settings(shards, bare, tmp_path / "bare run")).startswith(
        f"data.labelled.shards={bare} has images without labels; all of them need one. "
    )
    assert refusal(settings(shards, labelled, tmp_path / "val", f"classifier.val={bare}")).startswith(
        f"classifier.val={bare} needs labels below 3. It has images without a label: "
    )


def write_bare(folder):
    """Three images without labels."""
    folder.mkdir()
    with tarfile.open(folder / "part.tar", "w") as archive:
        for number in range(3):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file, format="PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(file.getvalue())
            archive.addfile(info, io.BytesIO(file.getvalue()))
    return folder


@pytest.mark.other
def test_methods_without_labels_refuse_them(tmp_path, shards, labelled):
    argv = ["recipe=cifar10_simclr_resnet18", f"data.shards={shards}", f"output={tmp_path / 'run'}", "knn=null"]
    config = load(PretrainConfig, [*argv, f"data.labelled.shards={labelled}"], recipes=RECIPES)
    assert refusal(config) == "SimCLR does not use data.labelled. Leave it out, or set data.labelled=null."
    config = load(
        PretrainConfig, [*argv, "data.batch_size=8", f"classifier={{every: 1ep, val: {shards}}}"], recipes=RECIPES
    )
    assert refusal(config) == ("SimCLR learns no classifier to measure. Leave classifier out; knn suits any method.")

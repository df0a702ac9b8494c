"""The semi-supervised methods beside FixMatch: a step of each against its rules, written out."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.methods.adamatch import AdaMatch
from ssl_pipeline.methods.flexmatch import FlexMatch
from ssl_pipeline.methods.freematch import FreeMatch
from ssl_pipeline.methods.mean_teacher import MeanTeacher
from ssl_pipeline.methods.mixmatch import MixMatch
from ssl_pipeline.methods.pi_model import PiModel
from ssl_pipeline.methods.pseudo_label import PseudoLabel
from ssl_pipeline.methods.remixmatch import ReMixMatch, quarter_turns
from ssl_pipeline.methods.softmatch import SoftMatch
from ssl_pipeline.methods.supervised import Supervised
from ssl_pipeline.methods.temporal_ensembling import TemporalEnsembling
from ssl_pipeline.methods.uda import UDA, annealing_limit
from ssl_pipeline.modules.batch_mixing import draw_partners, draw_shares
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.modules.teacher import averaging_momentum
from ssl_pipeline.schedule import Progress
from tests.methods.toys import assert_same_tensors, copies, descend, follow, toy_method
from tests.tiny import CONFIGS, make_batch, make_method

FACTS = RunFacts(6, 3, 6, {"weak": (2,), "strong": (2,)}, (0.5,) * 3, (0.5,) * 3)
START = Progress(0, 10, 5)
FLAT = {"value": 3.0}


def toy(method, name, **settings):
    made = toy_method(method, CONFIGS[name](name=name, num_classes=3, **settings))
    made.prepare(FACTS)
    return made.double()


def batch_of(*, weak=1, strong=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def views(count, images):
        return torch.randn(count, images, 3, 2, 2, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, 3, (10,), generator=generator)
    labelled = Batch({"weak": views(weak, 4), "strong": views(strong, 4)}, labels[:4], torch.arange(4))
    return Batch({"weak": views(weak, 6), "strong": views(strong, 6)}, labels[4:], torch.arange(6), labelled=labelled)


def same_step(method, output, student, expected):
    """Loss, gradients and running statistics."""
    assert_close(output.loss, expected)
    output.loss.backward()
    expected.backward()
    for own, theirs in zip(method.pair.student.parameters(), student.parameters(), strict=True):
        assert_close(own.grad, theirs.grad)
    assert_close(list(method.pair.student.buffers()), list(student[0].buffers()))


def test_supervised_smooths_labels():
    method, batch = toy(Supervised, "supervised", label_smoothing=0.3), batch_of()
    student = copies(method.pair.student)
    logits = student(batch.labelled.one("weak"))
    expected = 0
    for i in range(4):
        for c in range(3):
            target = 0.1 + 0.7 * (batch.labelled.labels[i] == c)
            expected = expected - target * logits[i].log_softmax(0)[c] / 4
    same_step(method, method(batch, START), student, expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_supervised_mixes_images_and_labels_alike(kind):
    method, batch = toy(Supervised, "supervised", **{f"{kind}_alpha": 1.0}), batch_of()
    values = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    images = values[[0, 1, 2, 2], None, None, None].expand(4, 3, 8, 8)  # each image is its label
    torch.manual_seed(0)
    mixed, targets = method._mixed(images, torch.tensor([0, 1, 2, 2]))
    assert_close(targets.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert_close(mixed.mean(dim=(1, 2, 3)), targets @ values)
    assert not torch.equal(targets, F.one_hot(torch.tensor([0, 1, 2, 2]), 3).double())
    assert method(batch, START).loss.isfinite()


def test_mean_teachers_teacher_sees_the_second_views_in_training_mode():
    method = toy(MeanTeacher, "mean_teacher", consistency_weight=FLAT)
    student, teacher = copies(method.pair.student), copies(method.pair.teacher.network)
    for step in range(3):
        batch, progress = batch_of(weak=2, seed=step), Progress(step, 10, 5)
        first, second = (torch.cat([batch.labelled.views["weak"][v], batch.views["weak"][v]]) for v in (0, 1))
        logits, targets = student(first), teacher(second).detach()
        distance = sum((logits[i].softmax(0) - targets[i].softmax(0)).square().sum() for i in range(10)) / 30
        expected = F.cross_entropy(logits[:4], batch.labelled.labels) + 3 * distance
        output = method(batch, progress)
        assert_close(output.loss, expected)
        for network, loss in ((method, output.loss), (student, expected)):
            network.zero_grad()
            loss.backward()
            descend(network, 0.1)
        method.after_step([output.carry], progress)
        follow(teacher, student, min(1 - 1 / (step + 2), 0.99))
    assert_same_tensors(method.pair.teacher.network, teacher[0])
    assert_same_tensors(method.pair.student, student[0])


def test_consistency_on_unlabelled_images_alone():
    method, batch = (
        toy(MeanTeacher, "mean_teacher", consistency_weight=FLAT, consistency_on="unlabelled"),
        batch_of(weak=2),
    )
    whole = copies(method.pair.student)(torch.cat([batch.labelled.views["weak"][0], batch.views["weak"][0]]))
    targets = copies(method.pair.teacher.network)(torch.cat([batch.labelled.views["weak"][1], batch.views["weak"][1]]))
    distance = (whole[4:].softmax(1) - targets[4:].softmax(1)).square().mean()
    assert_close(method(batch, START).loss, F.cross_entropy(whole[:4], batch.labelled.labels) + 3 * distance)


def test_averaging_momentum_is_a_true_average_at_first():
    assert [averaging_momentum(Progress(step, 10, 5), limit=0.7) for step in range(4)] == [1 / 2, 1 - 1 / 3, 0.7, 0.7]


def test_pseudo_labels_come_from_the_same_pass_which_leaves_the_running_statistics():
    method, batch = toy(PseudoLabel, "pseudo_label", threshold=0.5, unlabelled_weight=FLAT), batch_of()
    student = copies(method.pair.student)
    labelled = student(batch.labelled.one("weak"))
    other = copies(student)[0]  # what it sees is not kept
    with kept_statistics(student):
        logits = student(batch.one("weak"))
    kept = [i for i in range(6) if logits[i].softmax(0).max() >= 0.5]
    assert 0 < len(kept) < 6
    expected = F.cross_entropy(labelled, batch.labelled.labels)
    expected = expected + 3 * sum(-logits[i].log_softmax(0).max() for i in kept) / 6
    same_step(method, method(batch, START), student, expected)
    names = [name for name, _ in other.named_buffers() if not name.endswith("tracked")]
    assert_close([other.get_buffer(name) for name in names], [student.get_buffer(name) for name in names])


def test_kept_statistics_are_those_from_before_and_go_on_afterwards():
    norm, rows = torch.nn.BatchNorm1d(3), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    outside = norm(rows)
    before = norm.running_mean.clone()
    with kept_statistics(norm):
        assert_close(norm(rows), outside)
    assert torch.equal(norm.running_mean, before)
    norm(rows)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        (FlexMatch, "flexmatch", {"threshold": 0.5}),
        (FreeMatch, "freematch", {"statistics_momentum": 0.5, "fairness_weight": 0.0}),
        (SoftMatch, "softmatch", {"statistics_momentum": 0.5}),
    ],
)
def test_the_weighting_of_a_step_is_that_of_the_steps_before(method, name, settings):
    """What each weighting computes is tested beside it; here, that the method uses and stores it."""
    made = toy(method, name, unlabelled_weight=0.7, **settings)
    for step in range(3):
        batch = batch_of(seed=step)
        student = copies(made.pair.student)
        weighting = copies(made.weighting)[0]
        parts = torch.cat([batch.labelled.one("weak"), batch.one("weak"), batch.one("strong")])
        logits = student(parts)
        found = weighting(logits[4:10], logits[:4], batch.sample_ids)
        expected = F.cross_entropy(logits[:4], batch.labelled.labels)
        for i in range(6):
            expected = expected - 0.7 * found.weights[i] * logits[10 + i].log_softmax(0)[found.targets[i]] / 6
        output = made(batch, Progress(step, 10, 5))
        assert_close(output.loss, expected)
        made.after_step([output.carry], Progress(step, 10, 5))
        weighting.after_step([found.carry])
        assert_close(list(made.weighting.buffers()), list(weighting.buffers()))


def test_fairness_is_added_with_its_weight():
    method, batch = toy(FreeMatch, "freematch", statistics_momentum=0.5, fairness_weight=0.0), batch_of()
    without = method(batch, START)
    method.config = method.config.model_copy(update={"fairness_weight": 2.0})
    found = method(batch, START)
    assert found.metrics["fairness"] != 0
    assert_close(found.loss, without.loss + 2 * found.metrics["fairness"])


@pytest.mark.parametrize("share", ["row", "batch"])
def test_mixmatch_guesses_then_mixes_then_passes_all_at_once(share):
    settings = {"unlabelled_weight": FLAT, "mixup_share": share}
    method, batch = toy(MixMatch, "mixmatch", **settings), batch_of(weak=2)
    student, views = copies(method.pair.student), batch.views["weak"]
    with torch.no_grad(), kept_statistics(student):
        guess = student(views.flatten(0, 1)).softmax(1).unflatten(0, (2, 6)).mean(0) ** 2
    guess = guess / guess.sum(1, keepdim=True)
    rows = torch.cat([batch.labelled.views["weak"][0], *views])
    targets = torch.cat([F.one_hot(batch.labelled.labels, 3).double(), guess, guess])
    torch.manual_seed(3)
    draws = draw_shares(16 if share == "row" else 1, 0.75, rows.device).expand(16)
    partners = draw_partners(16, rows.device)
    mixed = []
    for i in range(16):
        own = max(draws[i].item(), 1 - draws[i].item())
        mixed.append([own * x[i] + (1 - own) * x[partners[i]] for x in (rows, targets)])
    logits, mixed_targets = student(torch.stack([x for x, _ in mixed])), torch.stack([t for _, t in mixed])
    expected = -(mixed_targets[:4] * logits[:4].log_softmax(1)).sum() / 4
    expected = expected + 3 * (logits[4:].softmax(1) - mixed_targets[4:]).square().mean()
    torch.manual_seed(3)
    same_step(method, method(batch, START), student, expected)


def test_shares_are_from_a_beta_distribution_and_partners_a_permutation():
    torch.manual_seed(0)
    draws = draw_shares(20_000, 0.75, torch.device("cpu"))
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var().item() == pytest.approx(1 / (4 * 2.5), abs=0.003)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert draw_partners(9, torch.device("cpu")).sort().values.tolist() == list(range(9))


def test_adamatch_interpolates_labelled_logits_and_learns_two_views_of_them():
    method, batch = toy(AdaMatch, "adamatch", unlabelled_weight=FLAT, distribution_window=4), batch_of()
    student, known = copies(method.pair.student), [batch.labelled.one("weak"), batch.labelled.one("strong")]
    logits = student(torch.cat([*known, batch.one("weak"), batch.one("strong")]))
    with kept_statistics(student):
        alone = student(torch.cat(known))
    torch.manual_seed(3)
    draws = torch.cat([torch.rand(4, 3), torch.rand(4, 3)])
    between = logits[:8] + draws * (alone - logits[:8])
    found = copies(method.weighting)[0](logits[8:14], between[:4], batch.sample_ids)
    expected = F.cross_entropy(between, batch.labelled.labels.repeat(2))
    kept = 0
    for i in range(6):
        kept += int(found.weights[i])
        expected = expected - 3 * found.weights[i] * logits[14 + i].log_softmax(0)[found.targets[i]] / 6
    assert kept > 0
    torch.manual_seed(3)
    same_step(method, method(batch, START), student, expected)


def test_usbs_adamatch_reads_no_strong_labelled_views():
    method = toy(AdaMatch, "adamatch", labelled_strong=False, interpolate=False, distribution_window=None)
    assert [views.name for views in method.needs if views.labelled] == ["weak"]
    assert method(batch_of(), START).loss.isfinite()


@pytest.mark.parametrize("form", ["authors", "detached"])
def test_the_pi_model_in_both_forms(form):
    method, batch = toy(PiModel, "pi_model", form=form, consistency_weight=FLAT), batch_of(weak=2)
    student = copies(method.pair.student)
    logits = student(torch.cat([*batch.labelled.views["weak"], *batch.views["weak"]]))
    first, second = torch.cat([logits[:4], logits[8:14]]), torch.cat([logits[4:8], logits[14:]])
    supervised = F.cross_entropy(first[:4], batch.labelled.labels)
    if form == "authors":
        expected = supervised * 4 / 10 + 3 * (first.softmax(1) - second.softmax(1)).square().mean()
    else:
        expected = supervised + 3 * (first[4:].softmax(1) - second[4:].softmax(1).detach()).square().mean()
    same_step(method, method(batch, START), student, expected)


def test_temporal_ensembling_remembers_each_image_by_its_number():
    method = toy(TemporalEnsembling, "temporal_ensembling", consistency_weight=FLAT)
    sums, visits = torch.zeros(6, 3, dtype=torch.float64), [0] * 6
    for step, ids in enumerate([[0, 1, 2, 3], [4, 2, 0, 1], [2, 5, 4, 4]]):
        whole = batch_of(seed=step)
        ids_B = torch.tensor(ids)
        batch = replace(whole, views={"weak": whole.views["weak"][:, :4]}, labels=whole.labels[:4], sample_ids=ids_B)
        student = copies(method.pair.student)
        logits = student(torch.cat([batch.labelled.one("weak"), batch.one("weak")]))
        expected = F.cross_entropy(logits[:4], batch.labelled.labels)
        for row, number in enumerate(ids):
            if visits[number]:
                target = sums[number] / (1 - 0.6 ** visits[number])
                expected = expected + 3 * (logits[4 + row].softmax(0) - target).square().sum() / 12
        output = method(batch, Progress(step, 10, 5))
        assert_close(output.loss, expected)
        for number in set(ids):  # image 4 comes twice in the last step: its last row counts, once
            row = max(place for place, other in enumerate(ids) if other == number)
            sums[number] = 0.6 * sums[number] + 0.4 * logits[4 + row].softmax(0).detach()
            visits[number] += 1
        halves = [{name: rows[part] for name, rows in output.carry.items()} for part in (slice(0, 2), slice(2, 4))]
        method.after_step(halves, Progress(step, 10, 5))
    assert_close(method.ensemble.predictions, sums)
    assert method.ensemble.visits.tolist() == visits == [2, 2, 3, 1, 2, 1]


def test_uda_of_one_pass_and_its_annealing():
    method, batch = toy(UDA, "uda", threshold=0.5), batch_of()
    student = copies(method.pair.student)
    logits = student(torch.cat([batch.labelled.one("weak"), batch.one("weak"), batch.one("strong")]))
    expected = F.cross_entropy(logits[:4], batch.labelled.labels)
    for i in range(6):
        weak = logits[4 + i].detach()
        if weak.softmax(0).max() > 0.5:
            sharp = (weak / 0.4).softmax(0)
            expected = expected + (sharp * (sharp.log() - logits[10 + i].log_softmax(0))).sum() / 6
    same_step(method, method(batch, START), student, expected)


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("log", 1 - math.exp(-2.5)), ("exp", math.exp(-2.5))])
def test_the_annealing_limit_rises_from_chance_to_certainty(kind, middle):
    limits = [annealing_limit(kind, Progress(step, 10, 5), num_classes=4) for step in (0, 5, 10)]
    assert limits[1] == pytest.approx(middle * 0.75 + 0.25)
    assert limits[0] < limits[1] < limits[2]


def test_remixmatch_adds_its_four_losses():
    settings = {"unlabelled_weight": FLAT, "unmixed_weight": {"value": 0.4}, "rotation_weight": 0.3}
    method, batch = (
        toy(ReMixMatch, "remixmatch", distribution_window=2, class_momentum=0.5, **settings),
        batch_of(strong=2),
    )
    method.classes.update(torch.tensor([0.6, 0.3, 0.1]))
    method.predictions.update(torch.tensor([0.1, 0.1, 0.8]))
    student, rotation = copies(method.pair.student), copies(method.rotation)
    weak, strong = batch.one("weak"), batch.views["strong"]
    with torch.no_grad(), kept_statistics(student):
        p = student(weak).softmax(1)
    aligned = p * (method.classes.value + 1e-6) / (method.predictions.value + 1e-6)
    guess = (aligned / aligned.sum(1, keepdim=True)) ** 2
    guess = guess / guess.sum(1, keepdim=True)
    rows = torch.cat([batch.labelled.views["strong"][0], *strong, weak])
    targets = torch.cat([F.one_hot(batch.labelled.labels, 3).double(), guess, guess, guess])
    torch.manual_seed(3)
    draws, partners = draw_shares(22, 0.75, rows.device), draw_partners(22, rows.device)
    own = torch.maximum(draws, 1 - draws).double()
    mixed = own.view(-1, 1, 1, 1) * rows + (1 - own).view(-1, 1, 1, 1) * rows[partners]
    mixed_targets = own[:, None] * targets + (1 - own)[:, None] * targets[partners]
    logits = student(mixed)
    turned = torch.stack([strong[0, i].rot90(i % 4, dims=(1, 2)) for i in range(6)])
    with kept_statistics(student):
        features = student[0].backbone(torch.cat([strong[0], turned]))
    unmixed = student[0].head(features[:6])
    expected = F.cross_entropy(logits[:4], mixed_targets[:4]) + 3 * F.cross_entropy(logits[4:], mixed_targets[4:])
    expected = expected + 0.4 * F.cross_entropy(unmixed, guess)
    expected = expected + 0.3 * F.cross_entropy(rotation(features[6:]), torch.arange(6) % 4)
    torch.manual_seed(3)
    output = method(batch, START)
    same_step(method, output, student, expected)
    assert_close(output.carry["predictions"], p.mean(0))
    assert_close(output.carry["classes"], F.one_hot(batch.labelled.labels, 3).double().mean(0))


def test_processes_share_the_turns_of_the_global_batch():
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected, turns = quarter_turns(images)
    assert turns.tolist() == [0, 1, 2, 3, 0, 1]
    with mock.patch("ssl_pipeline.methods.remixmatch.rank", return_value=1):
        second, second_turns = quarter_turns(images[3:])
    assert torch.equal(second, expected[3:])
    assert second_turns.tolist() == turns[3:].tolist()


def test_the_networks_of_co_training_teach_each_other():
    method, batch = make_method("co_training").double(), make_batch("co_training", dtype=torch.float64)
    groups = (batch.labelled.views["weak"], batch.views["weak"], batch.views["strong"])
    first, second = (
        pair.student(torch.cat([views[v] for views in groups])) for v, pair in enumerate((method.pair, method.second))
    )
    assert not torch.equal(first, second)
    expected = F.cross_entropy(first[:4], batch.labelled.labels) + F.cross_entropy(second[:4], batch.labelled.labels)
    for teacher, learner in ((first, second), (second, first)):
        for i in range(4):
            probability, guess = teacher[4 + i].softmax(0).detach().max(0)
            if probability >= 0.4:
                expected = expected - learner[8 + i].log_softmax(0)[guess] / 4
    assert_close(method(batch, START).loss, expected)


@pytest.mark.parametrize("name", ["adamatch", "co_training", "remixmatch", "uda", "flexmatch"])
def test_weak_and_strong_views_must_have_one_size(name):
    facts = replace(FACTS, view_sizes={"weak": (16,), "strong": (20,)})
    with pytest.raises(
        ConfigError, match=r"augment\.weak\.size and augment\.strong\.size must be the same\. Got 16 and 20"
    ):
        make_method(name).prepare(facts)


@pytest.mark.parametrize("name", ["flexmatch", "temporal_ensembling"])
def test_more_images_than_can_be_remembered_are_refused(name):
    with pytest.raises(ConfigError, match="remembers every image"):
        make_method(name).prepare(replace(FACTS, num_images=10**9, view_sizes={"weak": (16,), "strong": (16,)}))

"""What every method promises the engine; and that breaking a promise is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.methods.base import Method, StepOutput
from ssl_pipeline.methods.byol import BYOL
from ssl_pipeline.methods.dino import DINO
from ssl_pipeline.methods.moco import MoCo
from ssl_pipeline.methods.simclr import SimCLR
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ssl_pipeline.run.state import RunState
from ssl_pipeline.schedule import Schedule
from tests.tiny import CNN, CONFIGS, VIT, make_batch, make_method, needs, progress_at, takes_cnn

NAMES = sorted(CONFIGS)
COLLAPSE_SIGNALS = {"feature_std", "target_entropy"}
ADAMW = OptimConfig(name="adamw", lr=Schedule(value=1e-2), weight_decay=Schedule(value=0.1), clip_norm=1.0)
MakeMethod = Callable[[int], Method]  # from the seed of its weights


def step(method: Method, optimizer: torch.optim.Optimizer, name: str, number: int) -> StepOutput:
    """One optimizer step as the engine makes it, with two micro-batches."""
    progress = progress_at(number)
    write_values(optimizer, ADAMW, ADAMW.lr, progress)
    torch.manual_seed(number)
    outputs = [method(make_batch(name, seed=2 * number + micro), progress) for micro in (0, 1)]
    (sum(output.loss for output in outputs) / 2).backward()
    prepare_gradients(optimizer, ADAMW, progress)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        method.after_step([output.carry for output in outputs], progress)
    return outputs[0]


def state_of(method: nn.Module, *, statistics: bool = True) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, also of those that are not saved; batch-norm statistics on request."""
    tensors = dict(method.named_parameters()) | dict(method.named_buffers())
    plain = {name: value for name, value in vars(method).items() if isinstance(value, torch.Tensor)}
    return {
        name: tensor.detach().clone()
        for name, tensor in (tensors | plain).items()
        if statistics or not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def check_forward_is_pure(make: MakeMethod, name: str) -> None:
    method = make(0)
    before = state_of(method, statistics=False)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # drop path
        output = method(make_batch(name), progress_at(1))
        output.loss.backward()
        losses.append(output.loss.item())
    assert differing(before, state_of(method, statistics=False)) == []
    assert losses[0] == losses[1]


def check_outputs(make: MakeMethod, name: str) -> None:
    output = make(0)(make_batch(name), progress_at(1))
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    assert output.loss.requires_grad
    for metric, value in output.metrics.items():
        assert value.shape == (), metric
        assert value.isfinite(), metric
        assert not value.requires_grad, metric
    assert not any(value.requires_grad for value in output.carry.values())
    assert COLLAPSE_SIGNALS & output.metrics.keys(), "no collapse signal"


def check_gradient_reaches_what_is_trained(make: MakeMethod, name: str) -> None:
    method = make(0)
    method(make_batch(name), progress_at(1)).loss.backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert reached == trained
    # a bias before a batch norm cancels out, but for rounding
    assert [name for name, parameter in method.named_parameters() if name in reached and not parameter.grad.any()] == []


def trained_weights(method: Method) -> dict[str, torch.Tensor]:
    """Copies of what the optimizer trains, without what `after_step` may change."""
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad and name not in method.projected}
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def check_after_step_leaves_trained_weights_alone(make: MakeMethod, name: str) -> None:
    method = make(0)
    output = method(make_batch(name), progress_at(1))
    trained = trained_weights(method)
    with torch.no_grad():
        method.after_step([output.carry, output.carry], progress_at(1))
    assert differing(trained, trained_weights(method)) == []


def check_resume_is_exact(make: MakeMethod, name: str, folder) -> None:
    straight = make(0)
    optimizer = build_optimizer(straight, ADAMW)
    for number in (0, 1):
        step(straight, optimizer, name, number)
    tensors = {"method": straight.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    Checkpoints(folder).save(RunState(2, 1), tensors)
    expected = [step(straight, optimizer, name, number) for number in (2, 3)]

    resumed = make(1)  # other weights: all that matters must come from the checkpoint
    saved = Checkpoints(folder).load_latest()
    resumed.load_state_dict(saved.tensors["method"])
    optimizer = build_optimizer(resumed, ADAMW)
    load_optimizer_tensors(optimizer, saved.tensors["optimizer"])
    for number, output in zip((2, 3), expected, strict=True):
        assert torch.equal(step(resumed, optimizer, name, number).loss, output.loss), f"step {number}"
    assert differing(straight.state_dict(), resumed.state_dict()) == []


def maker(name: str, backbone=VIT) -> MakeMethod:
    return lambda seed: make_method(name, backbone=backbone, seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_forward_changes_nothing_and_repeats_itself(name):
    check_forward_is_pure(maker(name), name)


@pytest.mark.parametrize("name", [name for name in NAMES if takes_cnn(name)])
def test_forward_changes_nothing_but_batch_norm_statistics(name):
    check_forward_is_pure(maker(name, CNN), name)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_finite_and_detached_and_show_a_collapse(name):
    check_outputs(maker(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_exactly_what_is_trained(name):
    check_gradient_reaches_what_is_trained(maker(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_after_step_leaves_trained_weights_alone(name):
    check_after_step_leaves_trained_weights_alone(maker(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name, tmp_path):
    check_resume_is_exact(maker(name), name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_gives_features_of_its_width(name):
    method = make_method(name)
    method.eval()
    with torch.no_grad():
        features = method.backbone(torch.randn(3, 3, 16, 16))
    assert features.shape == (3, method.backbone.embed_dim)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_needs(name):
    method = make_method(name)
    names = [(views.name, views.labelled) for views in method.needs]
    assert names
    assert len(names) == len(set(names))
    assert sum(views.evaluated for views in method.needs) <= 1
    assert not method.needs[0].optional
    assert not method.needs[0].labelled or all(views.labelled for views in method.needs)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_optional_may_be_missing(name):
    batch = make_batch(name)
    for views in needs(name):
        without = {group: tensor for group, tensor in batch.views.items() if group != views.name}
        if views.optional:
            assert make_method(name)(replace(batch, views=without), progress_at(1)).loss.isfinite()
        elif not views.labelled:
            with pytest.raises(KeyError):
                make_method(name)(replace(batch, views=without), progress_at(1))


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_has_a_name_and_a_config(name):
    method = make_method(name)
    backbones = method.backbones()
    assert method.backbone is next(iter(backbones.values()))
    parts = set(method.modules())
    for backbone in backbones.values():
        assert backbone in parts
        assert create_backbone(backbone.config).embed_dim == backbone.embed_dim
    assert len(set(backbones.values())) == len(backbones)


@pytest.mark.parametrize("name", NAMES)
def test_what_after_step_may_change_are_trained_parameters(name):
    method = make_method(name)
    assert set(method.projected) <= {name for name, parameter in method.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_rules_fit_trained_parameters(name):
    method = make_method(name)
    optimizer = build_optimizer(method, ADAMW)  # refuses a rule that fits none
    in_groups = sum(len(group["params"]) for group in optimizer.param_groups)
    assert in_groups == sum(parameter.requires_grad for parameter in method.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_copy_has_the_same_state_names_and_shapes(name):
    shapes = [{key: value.shape for key, value in make_method(name, seed=seed).state_dict().items()} for seed in (0, 1)]
    assert shapes[0] == shapes[1]


# Mutations: what must not go unnoticed


class CentreAsAttribute(DINO):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        del self.centre._buffers["value"]
        self.centre.value = torch.zeros(config.num_prototypes)


class CentreMovedByForward(DINO):
    def forward(self, batch, progress):
        output = super().forward(batch, progress)
        self.centre.value.lerp_(output.carry["total"], 0.1)
        return output


class UnusedLayer(SimCLR):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.unused = nn.Linear(3, 3)


class DeadLayer(SimCLR):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.dead = nn.Linear(3, 3)

    def forward(self, batch, progress):
        output = super().forward(batch, progress)
        return StepOutput(output.loss + 0 * self.dead(torch.ones(1, 3)).sum(), output.metrics, output.carry)


class TrainedTeacher(BYOL):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.teacher.requires_grad_(True)


class UpdateOfTheStudent(BYOL):
    def after_step(self, carries, progress):
        for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            student.add_(teacher, alpha=0.1)


class AttachedMetric(SimCLR):
    def forward(self, batch, progress):
        output = super().forward(batch, progress)
        return StepOutput(output.loss, {**output.metrics, "same": output.loss * 1}, output.carry)


class NoCollapseSignal(SimCLR):
    def forward(self, batch, progress):
        return StepOutput(super().forward(batch, progress).loss)


class PositionNotSaved(MoCo):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.queue._non_persistent_buffers_set.add("position")


class CountOfUpdates(BYOL):
    """A momentum that depends on a counter of its own."""

    updates = 0

    def after_step(self, carries, progress):
        self.updates += 1
        self.teacher.update(self.student, 1 - 1 / (1 + self.updates))


MUTATIONS = {
    CentreAsAttribute: ("dino", check_resume_is_exact),
    CentreMovedByForward: ("dino", check_forward_is_pure),
    UnusedLayer: ("simclr", check_gradient_reaches_what_is_trained),
    DeadLayer: ("simclr", check_gradient_reaches_what_is_trained),
    TrainedTeacher: ("byol", check_gradient_reaches_what_is_trained),
    UpdateOfTheStudent: ("byol", check_after_step_leaves_trained_weights_alone),
    AttachedMetric: ("simclr", check_outputs),
    NoCollapseSignal: ("simclr", check_outputs),
    PositionNotSaved: ("moco", check_resume_is_exact),
    CountOfUpdates: ("byol", check_resume_is_exact),
}


@pytest.mark.parametrize("mutant", MUTATIONS, ids=lambda mutant: mutant.__name__)
def test_a_broken_method_is_caught(mutant, tmp_path):
    name, check = MUTATIONS[mutant]

    def make(seed: int) -> Method:
        config = make_method(name).config
        torch.manual_seed(seed)
        return mutant(config, create_backbone(VIT))

    arguments = (tmp_path,) if check is check_resume_is_exact else ()
    with pytest.raises(AssertionError):
        check(make, name, *arguments)

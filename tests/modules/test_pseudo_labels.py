"""Each weighting against its paper's rules, row by row; all of them as exchangeable parts of a method."""

import math
from copy import deepcopy
from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.modules.pseudo_labels import (
    CurriculumThresholds,
    FixedThreshold,
    GaussianWeights,
    RelativeThreshold,
    SelfAdaptiveThresholds,
)
from tests.methods.test_no_sync import cpu_refuses_to_wait
from tests.ranks import run_on_ranks

NUM_IMAGES, C, U, B = 12, 3, 8, 4
MAKE = {
    "fixed": lambda: FixedThreshold(threshold=0.6),
    "curriculum": lambda: CurriculumThresholds(NUM_IMAGES, C, threshold=0.6),
    "relative": lambda: RelativeThreshold(C, share=0.9, momentum=0.8, window=2),
    "relative, moving": lambda: RelativeThreshold(C, share=0.9, momentum=0.8, window=None),
    "self-adaptive": lambda: SelfAdaptiveThresholds(C, momentum=0.8),
    "Gaussian": lambda: GaussianWeights(C, momentum=0.8),
}


def inputs(step, micro=0):
    """Logits of the weak views and of the labelled images, and the numbers of the images, as on one process."""
    generator = torch.Generator().manual_seed(10 * step + micro)
    weak = 2 * torch.randn(U, C, generator=generator, dtype=torch.float64)
    labelled = 2 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    return weak, labelled, torch.randperm(NUM_IMAGES, generator=generator)[:U]


def share(tensors):
    return tuple(tensor.chunk(world_size())[rank()] for tensor in tensors)


def rows_of(logits):
    return [row.softmax(dim=0).tolist() for row in logits]


def mean(values):
    return sum(values) / len(values)


def moved(old, new, momentum=0.8):
    return momentum * old + (1 - momentum) * new


def argmax(row):
    return row.index(max(row))


class Fixed:
    def __call__(self, weak, labelled, numbers):
        return [float(max(row) >= 0.6) for row in weak]


class Curriculum:
    def __init__(self):
        self.labels = [-1] * NUM_IMAGES

    def __call__(self, weak, labelled, numbers):
        counts = [self.labels.count(c) for c in range(C)]
        shares = [count / max(*counts, self.labels.count(-1)) for count in counts]
        kept = [float(max(row) >= 0.6 * shares[argmax(row)] / (2 - shares[argmax(row)])) for row in weak]
        for row, number in zip(weak, numbers, strict=True):
            if max(row) >= 0.6:
                self.labels[number] = argmax(row)
        return kept


class Relative:
    def __init__(self, window):
        self.target = [1 / C] * C
        self.model, self.window = [[1 / C] * C] * (window or 0), window

    def __call__(self, weak, labelled, numbers):
        labelled_mean = [mean([row[c] for row in labelled]) for c in range(C)]
        weak_mean = [mean([row[c] for row in weak]) for c in range(C)]
        self.target = [moved(self.target[c], labelled_mean[c]) for c in range(C)]
        if self.window:
            self.model = [*self.model[1:], weak_mean]
            model = [mean([batch[c] for batch in self.model]) for c in range(C)]
        else:
            self.model = [[moved(self.model[0][c], weak_mean[c]) for c in range(C)] if self.model else weak_mean]
            model = self.model[0]
        threshold = 0.9 * mean([max(row) for row in labelled])
        kept, self.guesses = [], []
        for row in weak:
            aligned = [row[c] * (self.target[c] + 1e-6) / (model[c] + 1e-6) for c in range(C)]
            kept.append(float(max(aligned) / sum(aligned) >= threshold))
            self.guesses.append(argmax(aligned))
        return kept


class SelfAdaptive:
    def __init__(self):
        self.confidence, self.p = 1 / C, [1 / C] * C

    def __call__(self, weak, labelled, numbers):
        self.confidence = moved(self.confidence, mean([max(row) for row in weak]))
        self.p = [moved(self.p[c], mean([row[c] for row in weak])) for c in range(C)]
        return [float(max(row) >= self.confidence * self.p[argmax(row)] / max(self.p)) for row in weak]


class Gaussian:
    def __init__(self):
        self.mu, self.var, self.p = 1 / C, 1.0, None

    def __call__(self, weak, labelled, numbers):
        confidence = [max(row) for row in weak]
        new = mean(confidence)
        self.mu = moved(self.mu, new)
        self.var = moved(self.var, sum((value - new) ** 2 for value in confidence) / (len(weak) - 1))
        batch = [mean([row[c] for row in weak]) for c in range(C)]
        self.p = batch if self.p is None else [moved(self.p[c], batch[c]) for c in range(C)]
        weights = []
        for row in weak:
            aligned = [row[c] * (1 / C + 1e-6) / (self.p[c] + 1e-6) for c in range(C)]
            below = min(max(aligned) / sum(aligned) - self.mu, 0)
            weights.append(math.exp(-(below**2) / (2 * self.var / 4)))
        return weights


ORACLES = {
    "fixed": Fixed,
    "curriculum": Curriculum,
    "relative": lambda: Relative(2),
    "relative, moving": lambda: Relative(None),
    "self-adaptive": SelfAdaptive,
    "Gaussian": Gaussian,
}


@pytest.mark.parametrize("name", MAKE)
def test_weights_over_some_steps_equal_the_rules(name):
    weighting, oracle = MAKE[name]().double(), ORACLES[name]()
    seen = set()
    for step in range(5):
        weak, labelled, numbers = inputs(step)
        rows = rows_of(weak)
        expected = oracle(rows, rows_of(labelled), numbers.tolist())
        found = weighting(weak, labelled, numbers)
        assert_close(found.weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
        guesses = getattr(oracle, "guesses", [argmax(row) for row in rows])
        assert found.targets.tolist() == guesses
        assert found.metrics["kept"].item() == pytest.approx(mean(expected))
        weighting.after_step([found.carry])
        seen |= set(expected)
    assert len(seen) > 1


def steps(name, num_steps=3, num_micro=2):
    """Weights and targets of each micro-batch of some steps, and the state that they leave."""
    weighting, outputs = MAKE[name]().double(), []
    for step in range(num_steps):
        carries = []
        for micro in range(num_micro):
            found = weighting(*share(inputs(step, micro)))
            outputs.append((found.weights.double(), found.targets))
            carries.append(found.carry)
        with torch.no_grad():
            weighting.after_step(carries)
    return outputs, dict(weighting.state_dict())


@pytest.mark.parametrize("name", MAKE)
def test_two_processes_weigh_as_one(name):
    expected, state = steps(name)
    (first, state_of_first), (second, state_of_second) = run_on_ranks(steps, name)
    for one, two, whole in zip(first, second, expected, strict=True):
        assert_close([torch.cat(parts) for parts in zip(one, two, strict=True)], list(whole), rtol=1e-9, atol=1e-12)
    for key, value in state.items():
        assert torch.equal(state_of_first[key], state_of_second[key]), key
        assert_close(state_of_first[key], value, rtol=1e-6, atol=1e-9)


def alone(name):
    """The same with statistics of the own rows."""
    here = "ssl_pipeline.modules.pseudo_labels"
    with mock.patch(f"{here}.mean_over_ranks", lambda x: x), mock.patch(f"{here}.gather", lambda x: x):
        return steps(name)


@pytest.mark.parametrize("name", ["curriculum", "relative", "self-adaptive", "Gaussian"])
def test_statistics_of_the_own_rows_are_noticed(name):
    (_, first), (_, second) = run_on_ranks(alone, name)
    assert any((first[key] - second[key]).abs().max() > 1e-3 for key in first if key != "unlabelled.position")


@pytest.mark.parametrize("name", MAKE)
def test_forward_changes_nothing_and_a_resumed_run_goes_on_alike(name):
    weighting, resumed = MAKE[name]().double(), MAKE[name]().double()
    for step in range(3):
        before = deepcopy(weighting.state_dict())
        outputs = [weighting(*inputs(step)) for _ in range(2)]
        assert torch.equal(outputs[0].weights, outputs[1].weights)
        assert all(torch.equal(value, before[key]) for key, value in weighting.state_dict().items())
        resumed.load_state_dict(before)
        assert torch.equal(resumed(*inputs(step)).weights, outputs[0].weights)
        weighting.after_step([outputs[0].carry])


@pytest.mark.parametrize("name", MAKE)
def test_weightings_take_each_others_place_in_a_loss(name):
    """The line in which FixMatch, FlexMatch, AdaMatch, FreeMatch and SoftMatch differ is the one that makes them."""
    weak, labelled, numbers = inputs(0)
    weak, labelled = weak.requires_grad_(), labelled.requires_grad_()
    strong = weak.detach().roll(1, dims=0).requires_grad_()
    found = MAKE[name]().double()(weak, labelled, numbers)
    loss = weighted_cross_entropy(strong, found.targets, found.weights)
    loss.backward()
    assert loss.isfinite()
    assert strong.grad.any()
    assert weak.grad is None
    assert labelled.grad is None
    everything = [found.weights, *found.metrics.values(), *found.carry.values()]
    assert not any(tensor.requires_grad for tensor in everything)
    assert all(metric.shape == () for metric in found.metrics.values())


@pytest.mark.parametrize("name", MAKE)
def test_half_precision_logits_are_weighed_in_float32(name):
    weak, labelled, numbers = inputs(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = MAKE[name]()(weak.bfloat16(), labelled.bfloat16(), numbers)
    floats = [tensor for tensor in (found.weights, *found.carry.values()) if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in floats)


@pytest.mark.parametrize("name", MAKE)
def test_nothing_makes_the_host_wait_for_the_device(name):
    weighting, arguments = MAKE[name]().double(), inputs(0)
    with cpu_refuses_to_wait():
        weighting.after_step([weighting(*arguments).carry])


def test_flexmatch_keeps_everything_in_its_first_step():
    weighting = MAKE["curriculum"]()
    assert weighting(torch.zeros(U, C), torch.zeros(B, C), torch.arange(U)).weights.all()


def test_freematch_clamps_its_thresholds():
    weighting = SelfAdaptiveThresholds(C, limits=(0.9, 0.95))
    weak = torch.tensor([[0.92, 0.05, 0.03], [0.89, 0.06, 0.05]]).log()
    assert weighting(weak, weak, torch.arange(2)).weights.tolist() == [True, False]


def test_softmatch_gives_full_weight_above_the_mean():
    weighting = GaussianWeights(2, momentum=0.0)
    weak = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.4, 0.6]]).log()
    weights = weighting(weak, weak, torch.arange(4)).weights
    # even predictions: nothing to align; mean 0.75, variance 0.03
    assert_close(weights, torch.tensor([1.0, math.exp(-0.0225 / (2 * 0.03 / 4)), 1.0, math.exp(-1.5)]))


def test_softmatch_needs_two_images_for_a_variance():
    with pytest.raises(ValueError, match="at least 2 unlabelled images"):
        GaussianWeights(C)(torch.zeros(1, C), torch.zeros(1, C), torch.arange(1))

"""Parts of a step on their own: the moving average, DINO's head with its loss, NT-Xent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import lightly_steps, official_steps
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.step import compare_losses
from benchmarks.training_steps import PROGRESS, follow_in_a_loop
from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import nt_xent
from ssl_pipeline.methods.dino import DINO, DINOConfig
from ssl_pipeline.modules.teacher import Teacher

EMA_BACKBONE = {"tiny": "test_resnet", "small": "vit_small_patch16_224", "large": "vit_large_patch16_224"}
UPDATES = 10
# images, features, prototypes
HEAD: dict[Size, tuple[int, int, int]] = {"tiny": (2, 8, 64), "small": (16, 384, 65536), "large": (64, 384, 65536)}
CROPS, GLOBAL_CROPS = 10, 2
PAIRS: dict[Size, int] = {"tiny": 32, "small": 4096, "large": 16384}
DIM, TEMPERATURE = 128, 0.1


def compare_ema(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Updates of a teacher per second."""
    name = EMA_BACKBONE[config.chosen_size()]
    comparison = Comparison("ema", "updates", name, UPDATES, ("official",))
    student: nn.Module = create_backbone(BackboneConfig(name=name)).to(config.torch_device())
    expected: list[Tensor] = []

    def add(name: str, update: Callable[[nn.Module], None], note: str, teacher: nn.Module | None = None) -> None:
        teacher = teacher or deepcopy(student).requires_grad_(False)
        with torch.no_grad():  # the weights of a teacher that began at zero, after one update
            for parameter in teacher.parameters():
                parameter.zero_()
            update(teacher)
        weights = [parameter.clone() for parameter in teacher.parameters()]
        expected.extend([] if expected else weights)
        torch.testing.assert_close(weights, expected)

        @torch.no_grad()
        def work() -> None:
            for _ in range(UPDATES):
                update(teacher)

        comparison.add(name, work, f"{note}; same weights after an update")

    add("official", lambda teacher: follow_in_a_loop(student, teacher, 0.9), "a loop over parameters")
    if comparison.has("lightly"):
        from lightly.models.utils import update_momentum

        note = "_foreach_mul_ and _foreach_add_"
        add("lightly", lambda teacher: update_momentum(student, teacher, m=0.9), note)
    ours = Teacher(student)
    add("ours", lambda teacher: ours.update(student, 0.9), "Teacher.update", ours.network)
    yield comparison


class _Features(nn.Flatten):
    """Stands in for a timm model: its images are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def compare_head(config: BenchmarkConfig) -> Iterator[Comparison]:
    """DINO's head and loss on given features, forward and backward, teacher included; images per second."""
    num_images, dim, num_prototypes = HEAD[config.chosen_size()]
    device = config.torch_device()
    setting = f"{num_prototypes} prototypes, {num_images} images of {CROPS} crops, {config.dtype()}"
    comparison = Comparison("head", "images", setting, num_images, ("official",))
    torch.manual_seed(0)
    settings = DINOConfig(name="dino", num_prototypes=num_prototypes, head_hidden_dim=min(2048, 8 * dim))
    method = DINO(settings, Backbone(_Features(dim))).to(device)
    features = torch.randn(CROPS, num_images, dim, device=device)
    crops = {"global": features[:GLOBAL_CROPS, ..., None, None], "local": features[GLOBAL_CROPS:, ..., None, None]}
    nowhere = torch.zeros(num_images, dtype=torch.long, device=device)
    batch = Batch(crops, nowhere, nowhere)

    def ours() -> Tensor:
        return method(batch, PROGRESS).loss

    with torch.no_grad():
        expected = ours().item()

    def add(name: str, loss: Callable[[], Tensor]) -> None:
        def work() -> None:
            with config.autocast():
                value = loss()
            value.backward()

        comparison.add(name, work, compare_losses(loss().item(), expected, ""), counted=work)

    def of_peer(head: Callable[[], nn.Module], loss: Callable, apply: Callable) -> Callable[[], Tensor]:
        student, teacher = head(), head()

        def step() -> Tensor:
            with torch.no_grad():
                targets = apply(teacher, features[:GLOBAL_CROPS])
            return loss(targets, apply(student, features))

        return step

    head, loss = partial(deepcopy, method.student.head), official_steps.dino_loss()
    add("official", of_peer(head, loss, lambda head, crops: head(crops.flatten(0, 1))))
    if comparison.has("lightly"):
        theirs, their_loss = partial(lightly_steps.dino_head, method), lightly_steps.dino_loss(method)
        add("lightly", of_peer(theirs, their_loss, lambda head, crops: [head(crop) for crop in crops]))
    add("ours", ours)
    yield comparison


def compare_nt_xent(config: BenchmarkConfig) -> Iterator[Comparison]:
    """NT-Xent forward and backward; pairs per second."""
    num_pairs, device = PAIRS[config.chosen_size()], config.torch_device()
    setting = f"{num_pairs} pairs of {DIM}, float32"
    comparison = Comparison("nt_xent", "pairs", setting, num_pairs, ("lightly", "plain PyTorch"))
    torch.manual_seed(0)
    z1, z2 = (torch.randn(num_pairs, DIM, device=device, requires_grad=True) for _ in range(2))
    ours = partial(nt_xent, temperature=TEMPERATURE)

    def add(name: str, loss: Callable[[Tensor, Tensor], Tensor], note: str = "") -> None:
        few = [z[: min(num_pairs, 512)] for z in (z1, z2)]
        values = loss(*few), ours(*few)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad(value, (z1, z2)) for value in values)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)

        def work() -> None:
            z1.grad = z2.grad = None
            loss(z1, z2).backward()

        comparison.add(name, work, f"{note}loss and gradient as ours", counted=work)

    add("plain PyTorch", partial(official_steps.whole_nt_xent, temperature=TEMPERATURE), "one matrix of similarities; ")
    if comparison.has("lightly"):
        from lightly.loss import NTXentLoss

        add("lightly", NTXentLoss(temperature=TEMPERATURE))
    add("ours", ours)
    yield comparison

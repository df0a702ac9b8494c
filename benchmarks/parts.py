"""Parts of a step on their own: the moving average, DINO's head with its loss, NT-Xent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import lightly_steps, official_steps
from benchmarks.peers import missing
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.step import compare_losses
from benchmarks.training_steps import PROGRESS, follow_in_a_loop
from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import nt_xent
from ssl_pipeline.methods.dino import DINO, DINOConfig
from ssl_pipeline.modules.teacher import Teacher

EMA_BACKBONE: dict[Size, BackboneConfig] = {
    "tiny": BackboneConfig(name="test_resnet"),
    "small": BackboneConfig(name="vit_small_patch16_224"),
    "large": BackboneConfig(name="vit_large_patch16_224"),
}
UPDATES = 10
# images, features, prototypes
HEAD: dict[Size, tuple[int, int, int]] = {
    "tiny": (2, 8, 64),
    "small": (16, 384, 65536),
    "large": (64, 384, 65536),
}
CROPS, GLOBAL_CROPS = 10, 2
PAIRS: dict[Size, int] = {"tiny": 32, "small": 4096, "large": 16384}
DIM, TEMPERATURE = 128, 0.1


def compare_ema(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Updates of a teacher per second."""
    backbone = EMA_BACKBONE[config.chosen_size()]
    left_out = missing("lightly")
    student = create_backbone(backbone).to(config.torch_device())
    expected = _followed(student, lambda teacher: follow_in_a_loop([student], [teacher], 0.9))

    def contestant(name: str, update: Callable[[nn.Module], None], note: str) -> Contestant:
        torch.testing.assert_close(_followed(student, update), expected)
        teacher = deepcopy(student).requires_grad_(False)

        def unit(number: int) -> int:
            with torch.no_grad():
                for _ in range(UPDATES):
                    update(teacher)
            return UPDATES

        return Contestant(name, unit, note=f"{note}; same weights after an update")

    contestants = [
        contestant("official", lambda teacher: follow_in_a_loop([student], [teacher], 0.9), "a loop over parameters"),
    ]
    if not left_out:
        from lightly.models.utils import update_momentum

        note = "_foreach_mul_ and _foreach_add_"
        contestants.append(contestant("lightly", lambda teacher: update_momentum(student, teacher, m=0.9), note))
    ours: Teacher[nn.Module] = Teacher(student)

    def our_update(teacher: nn.Module) -> None:
        ours.network = teacher
        ours.update(student, 0.9)

    contestants.append(contestant("ours", our_update, "Teacher.update"))
    yield Comparison("ema", "updates", contestants, references=("official",), left_out=left_out, setting=backbone.name)


def _followed(student: nn.Module, update: Callable[[nn.Module], None]) -> list[Tensor]:
    """The weights of a teacher that began at zero, after one update."""
    teacher = deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
        update(teacher)
    return list(teacher.parameters())


class _Features(nn.Module):
    """Stands in for a timm model: its images are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def compare_head(config: BenchmarkConfig) -> Iterator[Comparison]:
    """DINO's head and loss on given features, forward and backward, teacher included; images per second."""
    num_images, dim, num_prototypes = HEAD[config.chosen_size()]
    device, left_out = config.torch_device(), missing("lightly")
    torch.manual_seed(0)
    settings = DINOConfig(name="dino", num_prototypes=num_prototypes, head_hidden_dim=min(2048, 8 * dim))
    method = DINO(settings, Backbone(_Features(dim))).to(device)
    features = torch.randn(CROPS, num_images, dim, device=device)
    views = {"global": features[:GLOBAL_CROPS], "local": features[GLOBAL_CROPS:]}
    nowhere = torch.zeros(num_images, dtype=torch.long, device=device)
    batch = Batch({name: part[..., None, None] for name, part in views.items()}, nowhere, nowhere)

    def contestant(name: str, loss: Callable[[], Tensor], *, difference: str = "") -> Contestant:
        def unit(number: int) -> int:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.autocast()):
                value = loss()
            value.backward()
            return num_images

        note = compare_losses(loss().item(), expected, difference)
        return Contestant(name, unit, counted=unit, note=note)

    def ours() -> Tensor:
        return method(batch, PROGRESS).loss

    with torch.no_grad():
        expected = ours().item()
    contestants = [contestant("official", _official_head(method, features))]
    if not left_out:
        contestants.append(contestant("lightly", _lightly_head(method, features)))
    contestants.append(contestant("ours", ours))
    dtype = "bf16 autocast" if config.autocast() else "float32"
    setting = f"{num_prototypes} prototypes, {num_images} images of {CROPS} crops, {dtype}"
    yield Comparison("head", "images", contestants, ("official",), left_out, setting=setting)


def _official_head(method: DINO, features: Tensor) -> Callable[[], Tensor]:
    student, teacher = (official_steps.dino_head(method) for _ in range(2))
    criterion = official_steps.DinoLoss(method.config.num_prototypes, CROPS).to(features.device)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = teacher(features[:GLOBAL_CROPS].flatten(0, 1))
        return criterion(student(features.flatten(0, 1)), targets)

    return loss


def _lightly_head(method: DINO, features: Tensor) -> Callable[[], Tensor]:
    student, teacher = (lightly_steps.dino_head(method) for _ in range(2))
    criterion = lightly_steps.dino_loss(method)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = [teacher(crop) for crop in features[:GLOBAL_CROPS]]
        return criterion(targets, [student(crop) for crop in features])

    return loss


def compare_nt_xent(config: BenchmarkConfig) -> Iterator[Comparison]:
    """NT-Xent forward and backward; pairs per second."""
    num_pairs, left_out = PAIRS[config.chosen_size()], missing("lightly")
    device = config.torch_device()
    torch.manual_seed(0)
    z1, z2 = (torch.randn(num_pairs, DIM, device=device, requires_grad=True) for _ in range(2))

    def contestant(name: str, loss: Callable[[Tensor, Tensor], Tensor], note: str = "") -> Contestant:
        def unit(number: int) -> int:
            z1.grad = z2.grad = None
            loss(z1, z2).backward()
            return num_pairs

        return Contestant(name, unit, counted=unit, note="; ".join(filter(None, (note, _agree(loss)))))

    def _agree(loss: Callable[[Tensor, Tensor], Tensor]) -> str:
        first, second = (z[: min(num_pairs, 512)] for z in (z1, z2))
        expected = nt_xent(first, second, temperature=TEMPERATURE)
        value = loss(first, second)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad(result, (z1, z2)) for result in (value, expected))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
        return "loss and gradient as ours"

    contestants = [contestant("plain PyTorch", _whole_matrix, "one matrix of similarities")]
    if not left_out:
        from lightly.loss import NTXentLoss

        contestants.append(contestant("lightly", NTXentLoss(temperature=TEMPERATURE)))
    contestants.append(contestant("ours", lambda z1, z2: nt_xent(z1, z2, temperature=TEMPERATURE)))
    setting = f"{num_pairs} pairs of {DIM}, float32"
    yield Comparison("nt_xent", "pairs", contestants, ("lightly", "plain PyTorch"), left_out, setting=setting)


def _whole_matrix(z1: Tensor, z2: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = rows @ rows.T / TEMPERATURE
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    partner = torch.arange(len(rows), device=rows.device).roll(len(z1))
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), partner)

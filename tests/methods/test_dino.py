"""DINO's step against the public functions on whole logits."""

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.losses import centred_softmax, prototypes, self_distillation
from ssl_pipeline.methods.dino import DINO, DINOConfig
from ssl_pipeline.schedule import Schedule
from tests.tiny import CNN, VIT, make_batch, progress_at


def dino(backbone=VIT, **changes):
    settings = {"num_prototypes": 12, "head_hidden_dim": 16, "head_bottleneck_dim": 8} | changes
    torch.manual_seed(0)
    method = DINO(
        DINOConfig(name="dino", teacher_temperature=Schedule(value=0.05), **settings), create_backbone(backbone)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        method.centre.value.normal_(std=0.1)
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method.double()


def whole(method, batch):
    """Loss, entropy of the teacher and its mean logits; the head sees all crops at once, as in the official code."""
    student, teacher = method.student, method.teacher.network
    global_views, local_views = batch.views["global"], batch.views["local"]
    with torch.no_grad():
        logits_TBK = teacher(global_views.flatten(0, 1)).unflatten(0, global_views.shape[:2])
    probabilities = centred_softmax(logits_TBK, method.centre.value, temperature=0.05)
    features = [student.backbone(views.flatten(0, 1)) for views in (global_views, local_views)]
    student_SBK = student.head(torch.cat(features)).unflatten(0, (-1, global_views.shape[1]))
    entropy = -(probabilities * probabilities.log()).sum(dim=-1).mean()
    return self_distillation(student_SBK, probabilities, temperature=0.1), entropy, logits_TBK.mean(dim=(0, 1))


@pytest.mark.parametrize("backbone", [VIT, CNN])
@pytest.mark.parametrize(
    "settings", [{}, {"fixed_prototype_scale": False}, {"head_batch_norm": True}, {"num_prototypes": 30}]
)
def test_a_step_equals_that_of_whole_logits(monkeypatch, backbone, settings):
    monkeypatch.setattr(prototypes, "SLAB", 7)
    method, batch = dino(backbone, **settings), make_batch("dino", dtype=torch.float64)
    output = method(batch, progress_at(1))
    loss, entropy, mean = whole(method, batch)
    assert_close(output.loss, loss, rtol=1e-10, atol=0)
    assert_close(output.metrics["target_entropy"], entropy, rtol=1e-10, atol=0)
    assert_close(output.carry["total"] / output.carry["rows"], mean, rtol=1e-10, atol=1e-12)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert_close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(loss, trained), rtol=1e-8, atol=1e-12)


def test_the_centre_follows_the_mean_over_the_rows_of_all_micro_batches():
    method = dino(centre_momentum=0.75)
    before, totals = method.centre.value.clone(), [torch.randn(12, dtype=torch.float64) for _ in range(2)]
    carries = [{"total": total, "rows": torch.tensor(rows)} for total, rows in zip(totals, (4.0, 6.0), strict=True)]
    method.after_step(carries, progress_at(1))
    assert_close(method.centre.value, 0.75 * before + 0.25 * (totals[0] + totals[1]) / 10)

"""Batch norm over several processes is batch norm over one bigger batch."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.modules.sync_batch_norm import CpuSyncBatchNorm, synchronize_batch_norm
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
INPUTS = {"rows": (8, 3), "images": (8, 3, 4, 5)}
NORMS = {
    "plain": {},
    "slow": {"momentum": 0.01},
    "average of all": {"momentum": None},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def make_norm(shape: tuple[int, ...], options: dict) -> nn.Module:
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, dtype=torch.float64, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            norm.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
    return nn.Sequential(norm)


def two_steps(shape: tuple[int, ...], options: dict) -> dict[str, Tensor]:
    """Outputs and gradients of this rank's rows over two steps, and the buffers afterwards."""
    network = synchronize_batch_norm(make_norm(shape, options), CPU)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for step in (0, 1):
        inputs, targets = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1 for _ in range(2))
        inputs, targets = (value.chunk(world_size())[rank()].clone() for value in (inputs, targets))
        network.zero_grad()
        outputs = network(inputs.requires_grad_())
        mse_loss(outputs, targets).backward()
        found |= {f"{step} output": outputs.detach(), f"{step} gradient": inputs.grad / world_size()}
        found |= {f"{step} {name}": parameter.grad / world_size() for name, parameter in network.named_parameters()}
    found |= {f"buffer {name}": buffer.double() for name, buffer in network.named_buffers()}
    network.eval()
    with torch.no_grad():
        found["evaluated output"] = network(inputs) if options.get("track_running_stats", True) else outputs.detach()
    return found


@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_two_ranks_are_one_big_batch(shape, options):
    expected = two_steps(shape, options)
    first, second = run_on_ranks(two_steps, shape, options)
    for name, value in expected.items():
        if "output" in name or "gradient" in name:
            found = torch.cat([first[name], second[name]])
        elif name.startswith("buffer"):
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        else:
            found = first[name] + second[name]
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12, msg=name)


def half_precision(dtype: torch.dtype) -> tuple[torch.dtype, Tensor]:
    network = synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), CPU)
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 100
    outputs = network(images.to(dtype).chunk(2)[rank()])
    return outputs.dtype, outputs.float()


def test_half_precision_is_normalised_in_full():
    (dtype, first), (_, second) = run_on_ranks(half_precision, torch.bfloat16)
    assert dtype == torch.bfloat16
    both = torch.cat([first, second])
    torch.testing.assert_close(both.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=0.01)
    torch.testing.assert_close(both.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=0.02)


def replaced() -> tuple[list[str], list[str], list[str]]:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.LayerNorm(3))
    names = list(network.state_dict())
    synchronize_batch_norm(network, CPU)
    synchronize_batch_norm(network, CPU)  # once more changes nothing
    kinds = [type(part).__name__ for part in network.modules() if not list(part.children())]
    return names, list(network.state_dict()), kinds


def test_every_batch_norm_is_replaced_and_keeps_its_names():
    (before, after, kinds), _ = run_on_ranks(replaced)
    assert before == after
    assert kinds == ["CpuSyncBatchNorm", "Linear", "CpuSyncBatchNorm", "LayerNorm"]


def refusal() -> str:
    with pytest.raises(ConfigError) as error:
        synchronize_batch_norm(nn.Sequential(BatchNormAct2d(3)), CPU)
    return str(error.value)


def test_what_cannot_be_synchronised_is_refused():
    for sentence in run_on_ranks(refusal):
        assert sentence.startswith(
            "train.sync_batch_norm on CPUs supports only plain batch norm. 0 is a BatchNormAct2d"
        )


def test_one_process_needs_nothing():
    network = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronize_batch_norm(network, CPU) is network
    assert not isinstance(network[0], CpuSyncBatchNorm)

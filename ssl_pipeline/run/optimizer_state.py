"""An optimizer's state as named tensors, and back; its hyper-parameters are the recipe's and are not saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssl_pipeline.run.state import CheckpointError
from ssl_pipeline.sharded import shared_out_as


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "INDEX.name" -> tensor, INDEX counting the parameters through all groups.

    Parameters without state yet have no entry. A Python number becomes a float64 tensor, and stays one.
    """
    tensors = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD's momentum buffer before its first use
                continue
            if isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.float64)
            assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps a {type(value)} in {name!r}"
            tensors[f"{index}.{name}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's state by what `optimizer_tensors` gave; hyper-parameters stay as they are.

    Every tensor is whole, and goes to its parameter's device, processes and memory layout, but `step`, which torch
    keeps on the CPU unless the group is fused or capturable. Raises CheckpointError, with nothing changed, where an
    entry does not fit the parameters.
    """
    slots = [
        (parameter, bool(group.get("fused") or group.get("capturable")))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdigit() and name) or int(index) >= len(slots):
            raise CheckpointError(
                f"The saved optimizer state has an entry {key!r}; the optimizer has parameters "
                f"0 to {len(slots) - 1}. The model or its parameter groups have changed since."
            )
        parameter, step_on_device = slots[int(index)]
        if value.ndim > 0 and value.shape != parameter.shape:
            raise CheckpointError(
                f"The saved optimizer state {key!r} has shape {tuple(value.shape)}; its parameter has "
                f"{tuple(parameter.shape)}. The model or its parameter groups have changed since."
            )
        device = parameter.device if name != "step" or step_on_device else torch.device("cpu")
        same_shape = value.shape == parameter.shape
        like, value = (parameter, shared_out_as(value, parameter)) if same_shape else (value, value)
        placed = torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False)
        state.setdefault(parameter, {})[name] = placed.copy_(value)
    optimizer.state.clear()
    optimizer.state.update(state)

"""Values into the form that a timm network has: attention in one part or three, and tables of positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from ssl_pipeline.backbones.positions import Grid, is_antialiased, resample_positions

Tensors = dict[str, Tensor]
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
TABLE = "relative_position_bias_table"


def fit(named: Mapping[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> Tensors:
    """Tensors by timm's names, as close to the network's own as possible; others stay as they are.

    own: the network's state dict. Only zero biases that the network does not have are left out.
    """
    found = dict(named)
    for stem in sorted({name[: name.index("attn.") + 5] for name in found if "attn." in name}):
        _fit_weights(found, own, stem)
        _fit_biases(found, own, stem)
    _fit_tables(found, model, own)
    _fit_positions(found, model, own)
    for name, value in found.items():
        if name in own and value.ndim != own[name].ndim and value.squeeze().shape == own[name].squeeze().shape:
            found[name] = value.reshape(own[name].shape)  # a linear layer as a 1x1 convolution, or the other way round
        elif name.endswith("num_batches_tracked") and value.ndim:
            found[name] = value.reshape(())
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # ports from other frameworks have none; nothing depends on it
            found.setdefault(name, value)
    return found


def _fit_weights(found: Tensors, own: Mapping[str, Tensor], stem: str) -> None:
    """Query, key and value as one layer or as three."""
    parts, split = [f"{stem}{part}.weight" for part in "qkv"], [f"{stem}{part}_proj.weight" for part in "qkv"]
    fused = f"{stem}qkv.weight"
    if fused in own and all(name in found for name in parts):
        found[fused] = torch.cat([found.pop(name) for name in parts])
    elif split[0] in own and fused in found:
        found.update(zip(split, found.pop(fused).chunk(3), strict=True))


def _fit_biases(found: Tensors, own: Mapping[str, Tensor], stem: str) -> None:
    """Those of query, key and value: one tensor, two (a key's bias changes nothing), three, or none if all are zero."""
    fused, query, value = f"{stem}qkv.bias", f"{stem}q.bias", f"{stem}v.bias"
    mask = found.pop(f"{fused}_mask", None)
    if fused in found and mask is not None:  # DINOv3: where it is 0, a bias does not count
        found[fused] = found[fused].masked_fill(mask == 0, 0.0)
    if fused in own:
        if query in found and value in found:
            key = found.pop(f"{stem}k.bias", torch.zeros_like(found[query]))
            found[fused] = torch.cat([found.pop(query), key, found.pop(value)])
        return
    if fused in found:
        for part, bias in zip("qkv", found.pop(fused).chunk(3), strict=True):
            found[f"{stem}{part}.bias"] = bias
    for part in "qkv":
        name = f"{stem}{part}.bias"
        spelt = next((other for other in (f"{stem}{part}_bias", f"{stem}{part}_proj.bias") if other in own), None)
        if name in found and spelt is not None:
            found[spelt] = found.pop(name)
        elif name in found and _is_zero(found[name]):
            del found[name]


def _is_zero(value: Tensor) -> bool:
    return not value.is_meta and not value.any()


def _fit_tables(found: Tensors, model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Biases for the distance of two patches: one table for all blocks becomes theirs, and each gets its size."""
    places = [name for name in own if name.endswith(TABLE)]
    if SHARED_TABLE in found and places and SHARED_TABLE not in own:
        shared = found.pop(SHARED_TABLE)
        found.update({name: shared for name in places})  # as BEiT and SimMIM do before fine-tuning
    for name in places:
        if name in found and found[name].ndim == 2 and found[name].shape != own[name].shape:
            if found[name].shape[1] != own[name].shape[1]:
                continue
            window = model.get_submodule(name.removesuffix(f".{TABLE}")).window_size
            found[name] = resize_rel_pos_bias_table(found[name], window, tuple(own[name].shape))  # type: ignore[arg-type]


def _fit_positions(found: Tensors, model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """The table of absolute positions, resampled to the network's grid; with or without rows for the class token."""
    table, grid = found.get("pos_embed"), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if table is None or grid is None or "pos_embed" not in own or table.shape == own["pos_embed"].shape:
        return
    own_prefix = own["pos_embed"].shape[1] - grid[0] * grid[1]
    prefix, side = _split_rows(table.shape[1] if table.ndim == 3 else 0, own_prefix)
    if side == 0:
        return
    rows, patches = table[:, :prefix], _resampled(table[:, prefix:], side, grid, model)
    if prefix < own_prefix:
        rows = torch.cat([rows, rows.new_zeros(1, own_prefix - prefix, rows.shape[2])], dim=1)
    elif own_prefix == 0 and prefix == 1 and "cls_token" in found:  # the network adds nothing to its class token
        found["cls_token"] = found["cls_token"] + rows
        rows = rows[:, :0]
    found["pos_embed"] = torch.cat([rows, patches], dim=1)


def _resampled(table_1LD: Tensor, side: int, grid: Grid, model: nn.Module) -> Tensor:
    if table_1LD.is_meta:
        return table_1LD.new_empty(1, grid[0] * grid[1], table_1LD.shape[2])
    return resample_positions(table_1LD.float(), (side, side), grid, antialias=is_antialiased(model))


def _split_rows(rows: int, own_prefix: int) -> tuple[int, int]:
    """How many rows come before those of a square of patches, and its side; (0, 0) if there is no such square."""
    for prefix in (own_prefix, 1, 0):
        side = round(max(rows - prefix, 0) ** 0.5)
        if side and side * side == rows - prefix:
            return prefix, side
    return 0, 0

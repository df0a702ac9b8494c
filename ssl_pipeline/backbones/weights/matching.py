"""Which network of a file is wanted, where in the file it lies, and which layout its names follow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pipeline.backbones.weights.fitting import fit
from ssl_pipeline.backbones.weights.layouts import LAYOUTS, PARTS, SPELLINGS, STUDENTS, TAKEN_FIRST, TEACHERS, Layout


@dataclass(frozen=True)
class Match:
    """A network in a file: `root` is what its names begin with there.

    original_of: timm's name of each of its tensors -> the name in the file. filled: how many of the network's own
    tensors it fills.
    """

    root: str
    original_of: dict[str, str]
    filled: int


def find_network(tensors: Mapping[str, Tensor], model: nn.Module, *, network: str | None) -> Match:
    """The network in the file that fills most of `model`; of several, the one that is asked for (teacher or student).

    Raises LookupError, which names what there is, if the file has no such network.
    """
    own = model.state_dict()
    shapes = {name: value.to("meta") for name, value in tensors.items()}
    own_shapes = {name: value.to("meta") for name, value in own.items()}
    matches = [
        _match(shapes, model, own_shapes, root, layout) for root, layout in _places(tensors, next(iter(own), ""), own)
    ] or [_match(shapes, model, own_shapes, "", LAYOUTS[0])]
    # a network that lacks some tensors is still the teacher, or the student, that it is: the caller says what it lacks
    half = max(match.filled for match in matches) / 2
    roots = dict.fromkeys(match.root for match in matches)
    by_root = [max((m for m in matches if m.root == root), key=lambda match: match.filled) for root in roots]
    best = [match for match in by_root if match.filled >= half]
    if network is not None:
        roles = {role_of(match.root, others=[other.root for other in best]) for match in best}
        best = [match for match in best if role_of(match.root, others=[other.root for other in best]) == network]
        if not best:
            raise LookupError(" and a ".join(sorted(role or "network of no such name" for role in roles)))
    return min(best, key=_rank)


def role_of(root: str, *, others: list[str]) -> str | None:
    """What the network at `root` is by the words of its place; None for a single network whose place says nothing."""
    words = set(root.split("."))
    if words & TEACHERS:
        return "teacher"
    beside_a_teacher = any(set(other.split(".")) & TEACHERS for other in others)
    return "student" if words & STUDENTS or beside_a_teacher else None


def part_of(name: str, root: str) -> str | None:
    """What a tensor that is left in the file belongs to; None for what is in the network and has no explanation."""
    inside = name.startswith(root)
    words = name.removeprefix(root).split(".") if inside else name.split(".")
    for start in range(1 if inside else len(words)):
        for pattern, part in PARTS:
            if re.match(pattern, ".".join(words[start:])):
                return part
    if inside:
        return None
    return "student" if set(words) & STUDENTS else "teacher" if set(words) & TEACHERS else "other parts"


def count_parts(names: list[str], root: str) -> dict[str, int]:
    """How many of the tensors left in a file belong to what, most first."""
    return dict(Counter(part_of(name, root) or "unknown" for name in names).most_common())


def _rank(match: Match) -> tuple[int, int, str]:
    words = set(match.root.split("."))
    return (0 if words & TAKEN_FIRST else 2 if words & TEACHERS else 1, len(match.root), match.root)


def _places(tensors: Mapping[str, Tensor], first: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Layout]]:
    """Each place where a network may lie, with its layout."""
    own_anchor = "patch_embed.proj.weight" if "patch_embed.proj.weight" in own else first
    for layout in LAYOUTS:
        anchor = layout.anchor or own_anchor
        for name in tensors:
            if name == anchor or name.endswith(f".{anchor}"):
                yield name.removesuffix(anchor), layout


def _match(
    shapes: Mapping[str, Tensor], model: nn.Module, own: Mapping[str, Tensor], root: str, layout: Layout
) -> Match:
    original_of: dict[str, str] = {}
    for name in shapes:
        if name.startswith(root):
            original_of.setdefault(_timms_name(name.removeprefix(root), own, layout), name)
    fitted = fit({ours: shapes[name] for ours, name in original_of.items()}, model, own)
    filled = sum(name in fitted and fitted[name].shape == value.shape for name, value in own.items())
    return Match(root, original_of, filled)


def _timms_name(name: str, own: Mapping[str, Tensor], layout: Layout) -> str:
    """The network's own name for a tensor, as far as the rules lead.

    Among timm's own names one that the network has stays as it is: the rules are about the others.
    """
    for pattern, replacement in layout.rules:
        if layout.anchor is None and name in own:
            return name
        name = re.sub(pattern, replacement, name)
    spelt = (re.sub(pattern, replacement, name) for pattern, replacement in SPELLINGS)
    return name if name in own else next((other for other in spelt if other in own), name)

"""A map of images by their features: similar ones lie close together."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ssl_pipeline.eval.page.examples import Examples
from ssl_pipeline.eval.page.html import Section, about, colour, legend, section, text
from ssl_pipeline.eval.page.pictures import thumbnail
from ssl_pipeline.eval.page.style import NUM_COLOURS

WIDTH, HEIGHT, MARGIN = 900, 560, 34
PICTURES, PICTURE = 48, 46  # how many, and their side
THUMBNAIL = 56


def map_section(examples: Examples) -> Section:
    """The first two principal components of the features as a plane, some of the images where they lie."""
    points_N2, share = principal_plane(examples.features)
    most = sorted(name for name, _ in Counter(filter(None, examples.classes)).most_common(NUM_COLOURS))
    places = _on_paper(points_N2).tolist()
    parts = []
    for name, (x, y) in zip(examples.classes, places, strict=True):
        fill = colour(most.index(name)) if name in most else "var(--faint)"
        label = f"<title>{text(name)}</title>" if name else ""
        parts.append(f'<circle fill="{fill}" fill-opacity="0.75" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{label}</circle>')
    for number in spread_out(_on_paper(points_N2), PICTURES, closest=PICTURE * 0.95):
        x, y = places[number]
        name = examples.classes[number]
        frame = colour(most.index(name)) if name in most else "var(--line)"
        box = f'x="{x - PICTURE / 2:.1f}" y="{y - PICTURE / 2:.1f}" width="{PICTURE}" height="{PICTURE}"'
        href = thumbnail(examples.index, examples.samples[number], side=THUMBNAIL)
        label = f"<title>{text(name)}</title>" if name else ""
        parts.append(f'<image href="{href}" {box} preserveAspectRatio="xMidYMid slice">{label}</image>')
        parts.append(f'<rect {box} fill="none" stroke="{frame}" stroke-width="2"/>')
    told = (
        f"{len(examples.samples):,} images of {examples.source} on the first two principal components of the features"
    )
    words = (
        f"{told}, which hold {100 * share:.0f} % of their variance: near ones are alike for the backbone. Colours are "
        "the classes with the most images, gray the others. Islands of one colour are classes that it tells apart; one "
        "cloud need not be bad, there are more dimensions than two."
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(told)}">{"".join(parts)}</svg>'
    return section("Map of the embeddings", about(words), legend(most) if most else "", f'<div class="map">{svg}</div>')


def principal_plane(features_ND: Tensor) -> tuple[Tensor, float]:
    """Features on their first two principal components (N, 2), and the share of the variance that these hold."""
    centred_ND = (features_ND - features_ND.mean(dim=0)).double()
    left_NK, values_K, _ = torch.linalg.svd(centred_ND, full_matrices=False)
    plane_N2 = left_NK[:, :2] * values_K[:2]
    if plane_N2.shape[1] < 2:
        plane_N2 = torch.nn.functional.pad(plane_N2, (0, 2 - plane_N2.shape[1]))
    total = values_K.square().sum().item()
    return plane_N2.float(), values_K[:2].square().sum().item() / total if total else 1.0


def _on_paper(points_N2: Tensor) -> Tensor:
    low_2, high_2 = points_N2.min(dim=0).values, points_N2.max(dim=0).values
    size_2 = torch.tensor([WIDTH - 2.0 * MARGIN, HEIGHT - 2.0 * MARGIN])
    return MARGIN + (points_N2 - low_2) / (high_2 - low_2).clamp(min=1e-12) * size_2


def spread_out(points_N2: Tensor, count: int, *, closest: float) -> list[int]:
    """Up to `count` points, each as far from those before it as can be, none closer than `closest`."""
    chosen = [int((points_N2 - points_N2.mean(dim=0)).square().sum(dim=1).argmax())]
    apart_N = (points_N2 - points_N2[chosen[0]]).abs().amax(dim=1)
    while len(chosen) < count:
        farthest = int(apart_N.argmax())
        if apart_N[farthest] < closest:
            break
        chosen.append(farthest)
        apart_N = torch.minimum(apart_N, (points_N2 - points_N2[farthest]).abs().amax(dim=1))
    return chosen

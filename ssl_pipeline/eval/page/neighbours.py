"""Nearest neighbours as pictures: of the suite's report, or among some images of the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.page.examples import Examples, classes_of
from ssl_pipeline.eval.page.html import Section, about, picture, pictures, rows_of, section
from ssl_pipeline.eval.page.pictures import thumbnail
from ssl_pipeline.eval.results import Report

TITLE = "Nearest neighbours"
QUERIES, SHOWN = 8, 5
READING = "A green frame is an image of the same class, a red one of another; without classes there is no frame."


def neighbours_of_suite(suite: Report) -> Section:
    """Test images with their nearest training images; DataError where the images are gone or differ."""
    protocol, found = suite["protocol"], suite["neighbours"]
    train, test = open_shards(str(protocol["train"])), open_shards(str(protocol["test"]))
    if {"train": train.fingerprint, "test": test.fingerprint} != suite["fingerprints"]:
        raise DataError(f"{protocol['train']} or {protocol['test']} holds other images now.")
    rows = []
    for sample, nearest, similar in zip(found["test"], found["train"], found["similarity"], strict=True):
        (own,), others = classes_of(test, [sample]), classes_of(train, nearest)
        shown = [picture(thumbnail(test, sample), own, kind="query")]
        shown += _framed(own, others, [thumbnail(train, number) for number in nearest], similar)
        rows.append(pictures(shown))
    words = (
        f"Test images (left) and the training images most similar to them, with the cosine of their features. {READING}"
    )
    return section(TITLE, about(words), rows_of(rows))


def neighbours_of_examples(examples: Examples) -> Section:
    """Images with their nearest ones among the examples."""
    queries = examples.spread(QUERIES)
    cosines_QN = examples.features[queries] @ examples.features.T
    cosines_QN[torch.arange(len(queries)), queries] = -torch.inf
    similar_QK, nearest_QK = cosines_QN.topk(min(SHOWN, len(examples.samples) - 1), dim=1)
    rows = []
    for query, nearest, similar in zip(queries, nearest_QK.tolist(), similar_QK.tolist(), strict=True):
        own = examples.classes[query]
        shown = [picture(_thumbnail(examples, query), own, kind="query")]
        found = [_thumbnail(examples, number) for number in nearest]
        shown += _framed(own, [examples.classes[number] for number in nearest], found, similar)
        rows.append(pictures(shown))
    words = (
        f"Images of {examples.source} (left) and those most similar to them among {len(examples.samples):,} of it, "
        f"with the cosine of their features. {READING}"
    )
    return section(TITLE, about(words), rows_of(rows))


def _thumbnail(examples: Examples, place: int) -> str:
    return thumbnail(examples.index, examples.samples[place])


def _framed(own: str, others: Sequence[str], addresses: Sequence[str], similar: Sequence[float]) -> list[str]:
    """Neighbours with a frame that says whether their class is the image's own."""
    found = []
    for other, address, cosine in zip(others, addresses, similar, strict=True):
        kind = "" if not own or not other else "same" if other == own else "other"
        found.append(picture(address, f"{other} {cosine:.2f}".strip(), kind=kind))
    return found

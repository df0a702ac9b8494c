"""The bar that shows how far a computation of an evaluator is, and how long it takes; the first process shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from ssl_pipeline.config import bar_interval
from ssl_pipeline.distributed import rank

Item = TypeVar("Item")


Bar = tqdm


def progress_bar(total: int, description: str, *, unit: str) -> Bar:
    """A bar that appears after a second, and goes when its block is left."""
    hidden, interval = rank() > 0, bar_interval()
    return tqdm(total=total, desc=description, unit=unit, leave=False, delay=1.0, mininterval=interval, disable=hidden)


def counted(items: Sequence[Item], description: str, *, unit: str) -> Iterator[Item]:
    """The same items; each is counted once its consumer is done with it."""
    with progress_bar(len(items), description, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()

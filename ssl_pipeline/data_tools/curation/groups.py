"""Groups of images connected by near pairs, and the image of each that stays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Numbers = NDArray[np.int64]

# Axes: N images, P pairs, G groups of two or more.


class Groups:
    """A union-find over images 0 to N-1: pairs come in parts, and what they join is one group (`number_of`, (N,)).

    A group is called by its lowest image. Memory: one number per image, whatever the number of pairs.
    """

    def __init__(self, num_images: int) -> None:
        self.number_of: Numbers = np.arange(num_images, dtype=np.int64)

    def join(self, first_P: Numbers, second_P: Numbers) -> None:
        """Merge the two groups of each pair."""
        ends_2P = self.number_of[np.stack([first_P, second_P])]
        ends_2P = ends_2P[:, ends_2P[0] != ends_2P[1]]
        if not ends_2P.size:
            return
        groups_U, places = np.unique(ends_2P, return_inverse=True)
        row, column = places.reshape(2, -1)
        graph = coo_matrix((np.ones(len(row), dtype=np.int8), (row, column)), shape=(len(groups_U),) * 2)
        _, component_U = connected_components(graph, directed=False)
        _, lowest = np.unique(component_U, return_index=True)  # groups_U ascends: the first of each is the lowest
        renamed_N = np.arange(len(self.number_of), dtype=np.int64)
        renamed_N[groups_U] = groups_U[lowest][component_U]
        self.number_of = renamed_N[self.number_of]

    def members(self) -> list[Numbers]:
        """The groups of two or more images, the largest first, each with its images ascending."""
        order_N = np.argsort(self.number_of, kind="stable")
        starts = np.flatnonzero(np.diff(self.number_of[order_N], prepend=-1))
        groups = np.split(order_N, starts[1:]) if len(order_N) else []
        return sorted((group for group in groups if len(group) > 1), key=lambda group: -len(group))


def best_of_each(number_of: Numbers, quality: NDArray) -> Numbers:
    """The image of each group that stays, ascending: of the highest quality (rows compare from the left), else the
    lowest number."""
    keys = (np.arange(len(number_of)), *(-quality.T[::-1]), number_of)
    order_N = np.lexsort(keys)
    first = np.flatnonzero(np.diff(number_of[order_N], prepend=-1))
    return np.sort(order_N[first])

"""Cutting utterances into microbatches under a budget of LLM positions, padding included."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def microbatches_by_rows(histogram_WD: np.ndarray, rows_D: np.ndarray) -> np.ndarray:
    """How many microbatches of so many rows each window is cut into: int64 [W, D].

    histogram_WD: utterances of each window by the rows that a microbatch has which they start.
    rows_D: these numbers, ascending, so that the longest utterances come first.
    """
    free = np.zeros(len(histogram_WD), dtype=np.int64)  # rows still free in the last microbatch
    made_WD = np.empty(histogram_WD.shape, dtype=np.int64)
    for d, rows in enumerate(rows_D.tolist()):
        rest = np.maximum(histogram_WD[:, d] - free, 0)
        made_WD[:, d] = -(-rest // rows)
        free = np.maximum(free - histogram_WD[:, d], 0) + made_WD[:, d] * rows - rest
    return made_WD


def cut(costs: Sequence[int], budget: int) -> list[int]:
    """Where microbatches start, taking utterances in order while rows x longest is in budget."""
    starts = [0]
    first = longest = 0
    for i, cost in enumerate(costs):
        if cost > longest:
            longest = cost
        if (i + 1 - first) * longest > budget and i > first:
            starts.append(i)
            first, longest = i, cost
    return starts


def cut_evenly(pool: np.ndarray, costs: np.ndarray, budget: int, count: int) -> list[np.ndarray]:
    """Cut `pool`, which fits into `count` microbatches, into min(count, len(pool)) of like cost."""
    pool = pool[np.lexsort((pool, -costs[pool]))]
    ordered = costs[pool].tolist()
    low, high = max(1, ordered[0]), budget  # the least budget that needs no more than `count`
    while low < high:
        middle = (low + high) // 2
        if len(cut(ordered, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    starts = cut(ordered, high)
    ends = [*starts[1:], len(ordered)]
    heap = [_piece(a, b, ordered) for a, b in zip(starts, ends, strict=True)]
    heapq.heapify(heap)
    while len(heap) < min(count, len(ordered)):  # halve the largest until they are enough
        _, a, b = heapq.heappop(heap)
        heapq.heappush(heap, _piece(a, (a + b) // 2, ordered))
        heapq.heappush(heap, _piece((a + b) // 2, b, ordered))
    return np.split(pool, sorted(a for _, a, _ in heap)[1:])


def _piece(start: int, end: int, ordered: Sequence[int]) -> tuple[int, int, int]:
    """Heap entry: first what can be halved, and of that the one with most positions."""
    size = end - start
    return (-size * ordered[start] if size > 1 else 1, start, end)

"""What is counted once, so that any epoch can be planned without looking at every utterance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20  # utterances at a time, so that what is computed on the way stays small


@dataclass(frozen=True, eq=False)
class PlanTable:
    """What is counted once for all epochs.

    bounds: int64 [shards + 1], where each shard's utterances start in `kept`.
    rows: int64 [D], ascending: the values of budget // cost, each the rows of a microbatch.
    counts: unsigned [shards, D], kept utterances of each shard with each of these values.
    """

    bounds: np.ndarray
    rows: np.ndarray
    counts: np.ndarray


def plan_table(
    shard_sizes: np.ndarray, costs: np.ndarray, kept: np.ndarray, budget: int
) -> PlanTable:
    """Count what plans of these utterances need. Shapes as in `plan_epoch`."""
    assert np.all(kept[1:] >= kept[:-1]), "kept is ascending"
    starts = totals(np.asarray(shard_sizes, dtype=np.int64))
    bounds = np.searchsorted(kept, starts)
    present = np.zeros(budget + 1, dtype=bool)
    for at in range(0, len(kept), _CHUNK):
        chunk = costs[kept[at : at + _CHUNK]]
        assert chunk.max() <= budget, "select() drops what is over the budget"
        assert chunk.min() > 0, "every utterance takes some positions"
        present[chunk] = True
    found = np.flatnonzero(present)
    rows = np.unique(budget // found)
    column_of = np.zeros(budget + 1, dtype=np.int64)
    column_of[found] = np.searchsorted(rows, budget // found)
    shards = len(bounds) - 1
    counts = np.zeros((shards, len(rows)), dtype=np.min_scalar_type(np.diff(bounds).max(initial=0)))
    first = 0
    while first < shards:  # whole shards, about a chunk of utterances at a time
        end = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _CHUNK, "right")) - 1)
        sizes = np.diff(bounds[first : end + 1])
        columns = column_of[costs[kept[bounds[first] : bounds[end]]]]
        cells = np.repeat(np.arange(end - first) * len(rows), sizes) + columns
        counts[first:end] = np.bincount(cells, minlength=counts[first:end].size).reshape(
            end - first, len(rows)
        )
        first = end
    return PlanTable(bounds, rows, counts)


def totals(counts: np.ndarray) -> np.ndarray:
    """int64, one longer: 0, and the sum up to each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

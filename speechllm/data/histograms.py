"""Counts of utterances by length, pace and sound, which add up over shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from speechllm.data.cleaning import AudioStatistics

# Bin i holds the values from edge i up to edge i + 1, the last one all above it. Values under the
# first edge are in the first bin.
EDGES: Mapping[str, tuple[float, ...]] = {
    "seconds": tuple(range(41)),
    "characters": tuple(range(0, 601, 20)),
    "characters_per_second": tuple(range(41)),
    "level": tuple(range(-96, 0, 3)),
    "silence": tuple(i / 20 for i in range(21)),
    "clipping": (0.0, 1e-9, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
Histograms = dict[str, list[int]]


class Measured(NamedTuple):
    """One utterance, by the names of EDGES."""

    seconds: float
    characters: int
    characters_per_second: float
    level: float
    silence: float
    clipping: float


def measured(text: str, seconds: float, sound: AudioStatistics) -> Measured:
    return Measured(seconds, len(text), len(text) / seconds, *sound)


def count(utterances: Sequence[Measured]) -> Histograms:
    """As many counts by name as it has edges."""
    values = np.array(utterances, np.float64).reshape(-1, len(Measured._fields))
    counts = {}
    for name, column in zip(Measured._fields, values.T, strict=True):
        edges = np.array(EDGES[name])
        bins = np.maximum(np.searchsorted(edges, column, side="right") - 1, 0)
        counts[name] = np.bincount(bins, minlength=len(edges)).tolist()
    return counts


def add_up(parts: Iterable[Histograms]) -> Histograms:
    total = {name: np.zeros(len(edges), np.int64) for name, edges in EDGES.items()}
    for part in parts:
        for name, counts in part.items():
            total[name] += np.array(counts, np.int64)
    return {name: counts.tolist() for name, counts in total.items()}

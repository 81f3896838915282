"""Several data sets in one epoch, each in its own proportion, as pure functions.

An epoch takes n_d utterances of data set d. Over the epochs they are cut, one after another, from
the endless stream of seeded permutations of d: epoch e takes positions e * n_d to (e + 1) * n_d.
So the proportions of an epoch are exact, and at any time two utterances of a data set have been
heard equally often or one of them once more. The state is still (epoch, step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechllm.config import data as schema
from speechllm.data.files import list_tars
from speechllm.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Part:
    """One data set of a mixture.

    kept: int64, ascending numbers of its utterances that are trained on. per_epoch: how many of
    them an epoch takes, more than there are where they are heard several times.
    """

    name: str
    kept: np.ndarray
    per_epoch: int


@dataclass(frozen=True, eq=False)
class Mixture:
    """parts: sorted by name. of_shard: the name of the data set of each shard of the corpus."""

    parts: tuple[Part, ...]
    of_shard: tuple[str, ...]


def plan_mixture(
    datasets: Mapping[str, schema.Dataset],
    temperature: float | None,
    of_shard: Sequence[str],
    shard_sizes: np.ndarray,
    kept: np.ndarray,
    durations: np.ndarray,
) -> Mixture:
    """The data sets of a mixture and what an epoch takes of each: one utterance at least.

    Args:
        of_shard: the data set of each shard, see `owners_of_shards`.
        shard_sizes: int64, utterances of each shard; utterances are numbered through.
        kept: int64, ascending numbers of the utterances to train on.
        durations: float64, seconds of every utterance.

    Raises:
        ConfigError: a data set has no utterance left.
    """
    names = sorted(datasets)
    number_of = {name: number for number, name in enumerate(names)}
    of_utterance = np.repeat([number_of[name] for name in of_shard], shard_sizes)[kept]
    numbers = [kept[of_utterance == number] for number in range(len(names))]
    for name, part in zip(names, numbers, strict=True):
        if not len(part):
            raise ConfigError(
                f"data.mixture.{name}: none of its utterances can be used (see the drops above); "
                "mend its shards or take it out of the mixture"
            )
    sizes = [len(part) for part in numbers]
    if temperature is None:
        counts = [
            max(1, round(datasets[n].weight * size)) for n, size in zip(names, sizes, strict=True)
        ]
    else:
        counts = tempered_counts(sizes, temperature)
    parts = tuple(
        Part(name, part, _capped(count, datasets[name], float(durations[part].mean())))
        for name, part, count in zip(names, numbers, counts, strict=True)
    )
    return Mixture(parts, tuple(of_shard))


def tempered_counts(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many of each an epoch takes, together as many as there are: shares go with
    size^(1/temperature), rounded to the largest remainders, but one at least of each."""
    shares = np.asarray(sizes, dtype=np.float64) ** (1 / temperature)
    exact = shares / shares.sum() * sum(sizes)
    counts = np.maximum(1, np.floor(exact).astype(np.int64))
    missing = sum(sizes) - int(counts.sum())
    if missing > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts.tolist()


def epoch_utterances(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """The utterances of one epoch: int64, ascending, an utterance as often as it is heard."""
    drawn = [np.repeat(part.kept, times_heard(part, seed, epoch)) for part in parts]
    return np.sort(np.concatenate(drawn), kind="stable")


def spread(taken: np.ndarray, shard_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay out an epoch's utterances so that the plan keeps repeats of one apart.

    The second occurrences of utterances stand in shards of their own behind all shards, the third
    behind these, and so on: they are permuted like any other shard, so an utterance meets itself
    in a window no more often than any other.

    Args:
        taken: int64, ascending, an utterance as often as it is heard.
        shard_sizes: int64, utterances of each shard; utterances are numbered through.

    Returns:
        The utterances in this order and the sizes of the shards, both int64.
    """
    shards = len(shard_sizes)
    occurrence = np.arange(len(taken)) - np.searchsorted(taken, taken)
    shard = np.searchsorted(np.cumsum(shard_sizes), taken, side="right")
    sizes = np.bincount(occurrence * shards + shard, minlength=shards)
    used = (sizes > 0) | (np.arange(len(sizes)) < shards)
    return taken[np.argsort(occurrence, kind="stable")], sizes[used].astype(np.int64)


def times_heard(part: Part, seed: int, epoch: int) -> np.ndarray:
    """How often the epoch takes each utterance of `part.kept`: int64."""
    size = len(part.kept)
    first, last = epoch * part.per_epoch, (epoch + 1) * part.per_epoch
    times = np.zeros(size, dtype=np.int64)
    for number in range(first // size, -(-last // size)):
        start, end = max(first - number * size, 0), min(last - number * size, size)
        if end - start == size:
            times += 1
        else:
            times += _places_within(part.name, size, seed, number, start, end)
    return times


def owners_of_shards(datasets: Mapping[str, schema.Dataset]) -> dict[str, str]:
    """The name of the data set that each shard belongs to, by its path or url, sorted by that.

    Raises ConfigError where there is no shard, and where one belongs to two data sets, which leaves
    its weight and prompt open.
    """
    owner: dict[str, str] = {}
    for name in sorted(datasets):
        for pattern in datasets[name].shards:
            found = list_tars(pattern)
            if not found:
                raise ConfigError(
                    f"data.mixture.{name}.shards: {pattern}: no *.tar shards there; give a "
                    "directory that holds them, or a glob such as DIR/**/*.tar"
                )
            for tar in found:
                if owner.setdefault(tar, name) != name:
                    raise ConfigError(
                        f"data.mixture: {tar} belongs to both {owner[tar]} and {name}; "
                        "give each shard to one data set"
                    )
    return dict(sorted(owner.items()))


def _capped(count: int, dataset: schema.Dataset, mean_seconds: float) -> int:
    if dataset.max_utterances:
        count = min(count, dataset.max_utterances)
    if dataset.max_hours:
        count = min(count, int(dataset.max_hours * 3600 / mean_seconds))
    return max(1, count)


def _places_within(
    name: str, size: int, seed: int, number: int, start: int, end: int
) -> np.ndarray:
    """bool [size]: which utterances stand at places start to end of permutation `number`.

    The order is that of random words, which need not be sorted for that.
    """
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    sequence = np.random.SeedSequence([seed, number], spawn_key=(2, stream))
    words = np.random.PCG64(sequence).random_raw(size)
    low_bits = np.uint64((1 << size.bit_length()) - 1)
    words = (words & ~low_bits) | np.arange(size, dtype=np.uint64)  # no two are the same
    bounds = [place for place in (start, end) if 0 < place < size]
    ordered = np.partition(words, bounds)
    inside = np.ones(size, dtype=bool)
    if start > 0:
        inside &= words >= ordered[start]
    if end < size:
        inside &= words < ordered[end]
    return inside

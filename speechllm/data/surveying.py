"""Which utterances make up which shard: decided once, from a look at the source."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from speechllm.data.cleaning import first_of_equals
from speechllm.data.journal import Plan
from speechllm.data.manifest import Manifest
from speechllm.data.pool import map_unordered
from speechllm.data.prepare import ABSENT, Dropped, Lines, PrepareSettings, Survey, survey
from speechllm.errors import DataError

_SURVEY_CHUNK = 512

# (what is being done, utterances done, utterances in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PackSettings:
    """shard_bytes: what a shard is aimed to have."""

    shard_bytes: int = 256 * 10**6
    seed: int = 0
    prepare: PrepareSettings = field(default_factory=PrepareSettings)

    def by_name(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {"shard_bytes": self.shard_bytes, "seed": self.seed, **self.prepare.by_name()}


class SourceSurvey(NamedTuple):
    """sizes: int64 [U], bytes that each utterance will take of a shard, 0 where it will be dropped.
    seconds: float64 [U], 0 also where no length was needed. absent, duplicates: see `Plan`."""

    sizes: np.ndarray
    seconds: np.ndarray
    dropped: list[Dropped]
    absent: list[str]
    duplicates: dict[str, str]


def wanted_plan(manifest: Manifest, settings: PackSettings) -> Plan:
    """What any plan for these shards says, before the source was looked at."""
    return Plan(manifest.sha256, manifest.name, settings.by_name(), [])


def plan_shards(
    manifest: Manifest, settings: PackSettings, num_workers: int, progress: Progress
) -> Plan:
    """Raises DataError if nothing would be left."""
    found = survey_manifest(manifest, settings, num_workers, progress)
    order = shuffled(manifest.ids, settings.seed)
    return Plan(
        manifest.sha256,
        manifest.name,
        settings.by_name(),
        cut(found.sizes[order], settings.shard_bytes),
        found.absent,
        found.duplicates,
    )


def survey_manifest(
    manifest: Manifest,
    settings: PackSettings,
    num_workers: int,
    progress: Progress,
    *,
    lengths: bool = False,
) -> SourceSurvey:
    """A look at all audio, in the manifest's order. lengths: of all utterances, also where sizes
    can be told without. Raises DataError if nothing would be left."""
    total = len(manifest)
    chunks = [range(i, min(i + _SURVEY_CHUNK, total)) for i in range(0, total, _SURVEY_CHUNK)]
    tasks = [lines_of(manifest, chunk) for chunk in chunks]
    parts: list[Survey | None] = [None] * len(chunks)
    done = 0
    look = partial(survey, settings=settings.prepare, lengths=lengths)
    for i, part in map_unordered(look, tasks, num_workers):
        parts[i] = part
        done += len(chunks[i])
        progress("Looking at the audio", done, total)
    whole = [part for part in parts if part is not None]
    sizes = np.concatenate([part.sizes for part in whole])
    seconds = np.concatenate([part.seconds for part in whole])
    dropped = [one for part in whole for one in part.dropped]
    absent = [one.id for one in dropped if one.reason in ABSENT]
    duplicates: dict[str, str] = {}
    if settings.prepare.clean.drop_duplicate_audio:
        first = first_of_equals(np.concatenate([part.hashes for part in whole]), sizes > 0)
        for i in np.flatnonzero((first >= 0) & (first != np.arange(total))).tolist():
            duplicates[manifest.ids[i]] = earlier = manifest.ids[int(first[i])]
            dropped.append(duplicate(int(manifest.line_numbers[i]), manifest.ids[i], earlier))
            sizes[i], seconds[i] = 0, 0.0
    if not sizes.any():
        raise nothing_left(manifest, dropped)
    return SourceSurvey(sizes, seconds, dropped, absent, duplicates)


def duplicate(line: int, utterance_id: str, earlier: str) -> Dropped:
    return Dropped(line, utterance_id, "duplicate audio", f"the samples are those of {earlier}")


def shuffled(ids: Iterable[str], seed: int) -> np.ndarray:
    """int64 [U]: an order that depends on the ids and the seed alone.

    By hash, so that neither numpy's generators nor the order of the lines have a say.
    """
    key = seed.to_bytes(8, "little")
    digests = bytearray()
    for one in ids:
        digests += hashlib.blake2b(one.encode(), digest_size=16, key=key).digest()
    halves = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int64)


def cut(sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """[0, ..., U]: where shards begin and end, for as many of like size as total / shard_bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1])
    shards = max(1, -(-total // shard_bytes))
    marks = [total * shard // shards for shard in range(1, shards)]
    inner = np.unique(np.searchsorted(ends, marks) + 1)
    return [0, *inner[inner < len(sizes)].tolist(), len(sizes)]


def lines_of(manifest: Manifest, numbers: Sequence[int]) -> Lines:
    lines = [(int(manifest.line_numbers[i]), manifest.line(i)) for i in numbers]
    return Lines(manifest.access, lines)


def nothing_left(manifest: Manifest, dropped: Sequence[Dropped]) -> DataError:
    reasons = Counter(one.reason for one in dropped)
    counts = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    hint = ""
    if reasons["missing"]:
        hint = f"; relative audio paths start at {manifest.directory}"
    first = dropped[0]
    return DataError(
        f"{manifest.path}: no utterance is left: {counts}; "
        f"e.g. line {first.line}: {first.reason}: {first.detail}{hint}"
    )

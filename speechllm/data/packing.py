"""Manifest -> a directory of shards, by many processes, resumable.

Which lines make up which shard is decided once, from the manifest, the seed and estimated sizes,
and kept in the journal, so that a run can go on where another ended. Each shard is made by one
process and depends on the plan and the audio alone, not on the number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from speechllm.data import journal
from speechllm.data.index import index_path, open_index
from speechllm.data.journal import (
    Plan,
    ShardReport,
    Share,
    journal_line,
    read_journal,
    refuse_foreign,
    refuse_other,
    tars_in,
    task_journals,
    write_journal,
)
from speechllm.data.manifest import Manifest
from speechllm.data.pool import map_unordered
from speechllm.data.prepare import (
    AudioSettings,
    Dropped,
    Lines,
    Survey,
    dropping,
    is_kept,
    prepare,
    survey,
)
from speechllm.data.shards import Sample, write_shard
from speechllm.errors import DataError

_SURVEY_CHUNK = 512

# (what is being done, utterances done, utterances in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PackSettings:
    """shard_bytes: what a shard is aimed to have."""

    shard_bytes: int = 256 * 10**6
    seed: int = 0
    audio: AudioSettings = field(default_factory=AudioSettings)

    def by_name(self) -> dict[str, Any]:
        return {"shard_bytes": self.shard_bytes, "seed": self.seed, **asdict(self.audio)}


@dataclass(frozen=True)
class ShardTask:
    tar: str
    lines: Lines


@dataclass(frozen=True)
class PackReport:
    """Totals over all shards, also those that an earlier run made. kept: audio files taken byte for
    byte; encoded: the rest. dropped: by line of the manifest."""

    shards: list[str]
    utterances: int
    seconds: float
    bytes: int
    kept: int
    encoded: int
    sample_rates: dict[str, int]
    dropped: list[Dropped]

    def drops_by_reason(self) -> dict[str, int]:
        return dict(Counter(one.reason for one in self.dropped).most_common())


def shuffled(ids: Sequence[str], seed: int) -> np.ndarray:
    """int64 [U]: an order that depends on the ids and the seed alone.

    By hash, so that neither numpy's generators nor the order of the lines have a say.
    """
    key = seed.to_bytes(8, "little")
    hashes = [hashlib.blake2b(one.encode(), digest_size=16, key=key).hexdigest() for one in ids]
    return np.argsort(np.array(hashes), kind="stable").astype(np.int64)


def cut(sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """[0, ..., U]: where shards begin and end, for as many of like size as total / shard_bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1])
    shards = max(1, -(-total // shard_bytes))
    marks = [total * shard // shards for shard in range(1, shards)]
    inner = np.unique(np.searchsorted(ends, marks) + 1)
    return [0, *inner[inner < len(sizes)].tolist(), len(sizes)]


def survey_manifest(
    manifest: Manifest, settings: PackSettings, num_workers: int, progress: Progress
) -> Survey:
    """Headers of all audio, in the manifest's order. Raises DataError if nothing would be left."""
    total = len(manifest)
    chunks = [range(i, min(i + _SURVEY_CHUNK, total)) for i in range(0, total, _SURVEY_CHUNK)]
    tasks = [_lines(manifest, chunk) for chunk in chunks]
    parts: list[Survey | None] = [None] * len(chunks)
    done = 0
    for i, part in map_unordered(partial(survey, settings=settings.audio), tasks, num_workers):
        parts[i] = part
        done += len(chunks[i])
        progress("Looking at the audio", done, total)
    whole = [part for part in parts if part is not None]
    sizes = np.concatenate([part.sizes for part in whole])
    seconds = np.concatenate([part.seconds for part in whole])
    dropped = [one for part in whole for one in part.dropped]
    if len(dropped) == total:
        raise _nothing_left(manifest, dropped)
    return Survey(sizes, seconds, dropped)


def pack(
    manifest: Manifest,
    directory: str,
    settings: PackSettings,
    *,
    num_workers: int,
    overwrite: bool,
    progress: Progress,
    share: Share | None = None,
) -> PackReport:
    """Make, or go on making, the shards of a manifest in a local directory.

    share: make only these, while other tasks make the others; the report is of these. Each shard
    is the same file whoever makes it. `complete` tells whether all are there.

    Raises DataError where the directory holds shards of another manifest, of other settings, or of
    another tool (remedy: overwrite, or another directory), and where no utterance is left.
    """
    assert not (share and overwrite), "a task would remove the shards of the others"
    wanted = Plan(manifest.sha256, manifest.name, settings.by_name(), [])
    tars = tars_in(directory)  # first: another task writes its journal before its first shard
    found = read_journal(directory)
    if found is None:
        refuse_foreign(directory, tars)
    elif not overwrite:
        refuse_other(directory, found[0], wanted)
    order = shuffled(manifest.ids, settings.seed)
    if found is None or overwrite:
        sizes = survey_manifest(manifest, settings, num_workers, progress).sizes
        plan = replace(wanted, cuts=cut(sizes[order], settings.shard_bytes))
        reports: dict[str, ShardReport] = {}
        if found is not None:
            _remove_shards(directory, found[0])
    else:
        plan, reports = found
    os.makedirs(directory, exist_ok=True)
    tars = plan.tars(directory)
    mine = set(tars if share is None else share.of(tars))
    reports = {
        tar: reports[tar] for tar in tars if tar in mine and tar in reports and _is_whole(tar)
    }
    _clear_leftovers(directory, mine if share else None)
    name = journal.NAME if share is None else share.journal
    write_journal(directory, plan, reports, name)
    tasks = [
        ShardTask(tar, _lines(manifest, order[first:last].tolist()))
        for tar, first, last in zip(tars, plan.cuts, plan.cuts[1:], strict=False)
        if tar in mine and tar not in reports
    ]
    results = map_unordered(partial(pack_shard, settings=settings.audio), tasks, num_workers)
    lines = sum(
        last - first
        for tar, first, last in zip(tars, plan.cuts, plan.cuts[1:], strict=False)
        if tar in mine
    )
    done = lines - sum(len(task.lines.lines) for task in tasks)
    progress("Writing shards", done, lines)
    with open(os.path.join(directory, name), "a", encoding="utf-8") as file:
        for i, report in results:
            reports[tasks[i].tar] = report
            file.write(journal_line(report))
            file.flush()
            os.fsync(file.fileno())
            done += len(tasks[i].lines.lines)
            progress("Writing shards", done, lines)
    if share is None:
        return _finish(manifest, directory, plan, reports)
    reports = {tar: reports[tar] for tar in tars if tar in mine}
    write_journal(directory, plan, reports, name)
    return _total(list(reports.values()))


def complete(manifest: Manifest, directory: str, settings: PackSettings) -> PackReport:
    """The totals of the shards that several tasks have made; their journals become one.

    Raises DataError where a shard is missing or not whole (remedy: the same tasks again), and as
    `pack` does where the directory is of something else.
    """
    found = read_journal(directory)
    if found is None:
        raise DataError(f"{directory}: no task has made any shards here")
    plan, reports = found
    wanted = Plan(manifest.sha256, manifest.name, settings.by_name(), [])
    refuse_other(directory, plan, wanted)
    tars = plan.tars(directory)
    missing = [os.path.basename(t) for t in tars if t not in reports or not _is_whole(t)]
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{directory}: {len(missing)} of {len(tars)} shards are missing ({listed}); run the "
            "same tasks again, or make_shards once without --task, which makes what is left"
        )
    return _finish(manifest, directory, plan, reports)


def _finish(
    manifest: Manifest, directory: str, plan: Plan, reports: dict[str, ShardReport]
) -> PackReport:
    """Write the whole journal; those of tasks go."""
    reports = {tar: reports[tar] for tar in plan.tars(directory)}
    write_journal(directory, plan, reports)
    for path in task_journals(directory):
        os.remove(path)
    total = _total(list(reports.values()))
    assert total.utterances + len(total.dropped) == len(manifest)
    if total.utterances == 0:
        raise _nothing_left(manifest, total.dropped)
    return total


def pack_shard(task: ShardTask, settings: AudioSettings) -> ShardReport:
    """Make one shard of those of its lines that are fit for it."""
    dropped: list[Dropped] = []
    lengths: list[float] = []
    rates: Counter[str] = Counter()
    kept = 0

    def samples() -> Iterator[Sample]:
        nonlocal kept
        for number, entry in task.lines.entries():
            try:
                sample = prepare(entry, task.lines.directory, settings)
            except DataError as error:
                dropped.append(dropping(number, entry, error))
                continue
            kept += is_kept(entry, settings)
            lengths.append(sample.duration)
            rates[str(sample.sample_rate)] += 1
            yield sample

    size = write_shard(task.tar, samples())
    return ShardReport(
        task.tar, len(lengths), sum(lengths), size, kept, dict(sorted(rates.items())), dropped
    )


def _lines(manifest: Manifest, numbers: Sequence[int]) -> Lines:
    lines = [(int(manifest.line_numbers[i]), manifest.line(i)) for i in numbers]
    return Lines(manifest.directory, lines)


def _nothing_left(manifest: Manifest, dropped: Sequence[Dropped]) -> DataError:
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


def _remove_shards(directory: str, plan: Plan) -> None:
    """The journals go last: until then another --overwrite can finish the work."""
    journals = [os.path.join(directory, journal.NAME), *task_journals(directory)]
    shards = plan.tars(directory)
    for path in (*shards, *map(index_path, shards), *journals):
        if os.path.exists(path):
            os.remove(path)


def _is_whole(tar: str) -> bool:
    try:
        open_index(tar)
    except DataError:
        return False
    return True


def _clear_leftovers(directory: str, tars: Set[str] | None) -> None:
    """What a killed run was writing; where other tasks write here too, only of these shards."""
    found = glob.glob(os.path.join(glob.escape(directory), "*.tmp-*"))
    for leftover in found:
        shard = leftover.rpartition(".tmp-")[0]
        if tars is None or shard in tars or shard in map(index_path, tars):
            os.remove(leftover)


def _total(reports: Sequence[ShardReport]) -> PackReport:
    rates: Counter[str] = Counter()
    for report in reports:
        rates.update(report.sample_rates)
    utterances = sum(report.utterances for report in reports)
    kept = sum(report.kept for report in reports)
    return PackReport(
        shards=[report.shard for report in reports],
        utterances=utterances,
        seconds=sum(report.seconds for report in reports),
        bytes=sum(report.bytes for report in reports),
        kept=kept,
        encoded=utterances - kept,
        sample_rates=dict(sorted(rates.items())),
        dropped=sorted((one for r in reports for one in r.dropped), key=lambda one: one.line),
    )

"""Manifest -> a directory of shards, by many processes, resumable.

Which lines make up which shard is decided once, from the manifest, the seed and estimated sizes,
and kept in the journal, so that a run can go on where another ended. Each shard is made by one
process and depends on the plan and the audio alone, not on the number of processes.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from speechllm.data import journal
from speechllm.data.histograms import Histograms, Measured, add_up, count
from speechllm.data.index import index_path, open_index
from speechllm.data.journal import (
    Plan,
    ShardReport,
    Share,
    append_to_journal,
    read_journal,
    refuse_foreign,
    refuse_other,
    tars_in,
    task_journals,
    write_journal,
)
from speechllm.data.manifest import Manifest
from speechllm.data.pool import map_unordered
from speechllm.data.prepare import ABSENT, Dropped, Lines, PrepareSettings, dropping, prepare
from speechllm.data.shards import Sample, write_shard
from speechllm.data.surveying import (
    PackSettings,
    Progress,
    duplicate,
    lines_of,
    nothing_left,
    plan_shards,
    shuffled,
    wanted_plan,
)
from speechllm.data.versions import versions
from speechllm.errors import DataError


@dataclass(frozen=True)
class ShardTask:
    """absent, duplicates: see `Plan`."""

    tar: str
    lines: Lines
    absent: Set[str] = field(default_factory=frozenset)
    duplicates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PackReport:
    """Of these shards, also those that an earlier run made, in their order."""

    plan: Plan
    shards: list[ShardReport]

    @property
    def utterances(self) -> int:
        return sum(shard.utterances for shard in self.shards)

    @property
    def seconds(self) -> float:
        return sum(shard.seconds for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def kept(self) -> int:
        """Audio files taken byte for byte."""
        return sum(shard.kept for shard in self.shards)

    @property
    def encoded(self) -> int:
        return self.utterances - self.kept

    @property
    def sample_rates(self) -> dict[str, int]:
        rates: Counter[str] = Counter()
        for shard in self.shards:
            rates.update(shard.sample_rates)
        return dict(sorted(rates.items()))

    @property
    def dropped(self) -> list[Dropped]:
        """By line of the source."""
        every = [one for shard in self.shards for one in shard.dropped]
        return sorted(every, key=lambda one: (one.line, one.id))

    def drops_by_reason(self) -> dict[str, int]:
        return dict(Counter(one.reason for one in self.dropped).most_common())

    def histograms(self) -> Histograms:
        return add_up(shard.histograms for shard in self.shards)


def pack(
    manifest: Manifest,
    directory: str,
    settings: PackSettings,
    *,
    num_workers: int,
    overwrite: bool,
    progress: Progress,
    share: Share | None = None,
    drop_unreadable: bool = False,
) -> PackReport:
    """Make, or go on making, the shards of a manifest in a local directory.

    share: make only these, while other tasks make the others; the report is of these. Each shard
    is the same file whoever makes it. `complete` tells whether all are there. drop_unreadable:
    leave out audio that was there when the shards were planned and now is not.

    Raises DataError where the directory holds shards of another manifest, of other settings, or of
    another tool (remedy: overwrite, or another directory), where no utterance is left, where the
    shards cannot be written, and where audio that was there has gone.
    """
    assert not (share and overwrite), "a task would remove the shards of the others"
    plan, reports = _planned(manifest, directory, settings, num_workers, overwrite, progress)
    tars = plan.tars(directory)
    mine = set(tars if share is None else share.of(tars))
    reports = {
        tar: reports[tar] for tar in tars if tar in mine and tar in reports and _is_whole(tar)
    }
    _clear_leftovers(directory, mine if share else None)
    name = journal.NAME if share is None else share.journal
    write_journal(directory, plan, reports, name)
    order = shuffled(manifest.ids, settings.seed)
    tasks = []
    done = lines = 0
    for tar, first, last in zip(tars, plan.cuts, plan.cuts[1:], strict=False):
        if tar in mine:
            lines += last - first
            if tar in reports:
                done += last - first
            else:
                tasks.append(_task(manifest, plan, tar, order[first:last]))
    make = partial(pack_shard, settings=settings.prepare, drop_unreadable=drop_unreadable)
    results = map_unordered(make, tasks, num_workers)
    progress("Writing shards", done, lines)
    for i, report in results:
        reports[tasks[i].tar] = report
        append_to_journal(directory, report, name)
        done += len(tasks[i].lines.lines)
        progress("Writing shards", done, lines)
    if share is None:
        return _finish(manifest, directory, plan, reports)
    reports = {tar: reports[tar] for tar in tars if tar in mine}
    write_journal(directory, plan, reports, name)
    return PackReport(plan, list(reports.values()))


def prepare_plan(
    manifest: Manifest,
    directory: str,
    settings: PackSettings,
    *,
    num_workers: int,
    overwrite: bool,
    progress: Progress,
) -> Plan:
    """Write the plan alone, so that the tasks that share the work need not look at the source each.

    Raises DataError as `pack` does.
    """
    plan, reports = _planned(manifest, directory, settings, num_workers, overwrite, progress)
    if not task_journals(directory):
        write_journal(directory, plan, reports)
    return plan


def complete(manifest: Manifest, directory: str, settings: PackSettings) -> PackReport:
    """The totals of the shards that several tasks have made; their journals become one.

    Raises DataError where a shard is missing or not whole (remedy: the same tasks again), and as
    `pack` does where the directory is of something else.
    """
    found = read_journal(directory)
    if found is None:
        raise DataError(f"{directory}: no task has made any shards here")
    plan, reports = found
    refuse_other(directory, plan, wanted_plan(manifest, settings))
    tars = plan.tars(directory)
    missing = [os.path.basename(t) for t in tars if t not in reports or not _is_whole(t)]
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{directory}: {len(missing)} of {len(tars)} shards are missing ({listed}); run the "
            "same tasks again, or make_shards once without --task, which makes what is left"
        )
    return _finish(manifest, directory, plan, reports)


def pack_shard(
    task: ShardTask, settings: PrepareSettings, drop_unreadable: bool = False
) -> ShardReport:
    """Make one shard of those of its lines that are fit for it."""
    dropped: list[Dropped] = []
    utterances: list[Measured] = []
    rates: Counter[str] = Counter()
    kept = 0

    def samples() -> Iterator[Sample]:
        nonlocal kept
        for number, utterance in task.lines.utterances():
            if earlier := task.duplicates.get(utterance.id):
                dropped.append(duplicate(number, utterance.id, earlier))
                continue
            try:
                prepared = prepare(utterance, task.lines.access, settings)
            except DataError as error:
                drop = dropping(number, utterance, error)
                if (
                    drop.reason in ABSENT
                    and utterance.id not in task.absent
                    and not drop_unreadable
                ):
                    raise _gone(drop) from error
                dropped.append(drop)
                continue
            kept += prepared.is_kept
            utterances.append(prepared.measured)
            rates[str(prepared.sample.sample_rate)] += 1
            yield prepared.sample

    written = write_shard(task.tar, samples())
    return ShardReport(
        shard=task.tar,
        utterances=len(utterances),
        seconds=sum(one.seconds for one in utterances),
        bytes=written.size,
        sha256=written.sha256,
        kept=kept,
        sample_rates=dict(sorted(rates.items())),
        histograms=count(utterances),
        versions=versions(),
        dropped=dropped,
    )


def _planned(
    manifest: Manifest,
    directory: str,
    settings: PackSettings,
    num_workers: int,
    overwrite: bool,
    progress: Progress,
) -> tuple[Plan, dict[str, ShardReport]]:
    """The plan that is there with the shards that are finished, or a new one. The directory is
    there afterwards, without the shards that are to be overwritten."""
    tars = tars_in(directory)  # first: another task writes its journal before its first shard
    found = read_journal(directory)
    if found is None:
        refuse_foreign(directory, tars)
    elif not overwrite:
        refuse_other(directory, found[0], wanted_plan(manifest, settings))
        return found
    plan = plan_shards(manifest, settings, num_workers, progress)
    if found is not None:
        _remove_shards(directory, found[0])
    os.makedirs(directory, exist_ok=True)
    return plan, {}


def _task(manifest: Manifest, plan: Plan, tar: str, numbers: np.ndarray) -> ShardTask:
    """Of the plan's exceptions only the task's own go along."""
    chosen = numbers.tolist()
    lines = lines_of(manifest, chosen)
    if not plan.absent and not plan.duplicates:
        return ShardTask(tar, lines)
    ids = {manifest.ids[i] for i in chosen}
    duplicates = {one: plan.duplicates[one] for one in ids & plan.duplicates.keys()}
    return ShardTask(tar, lines, ids.intersection(plan.absent), duplicates)


def _finish(
    manifest: Manifest, directory: str, plan: Plan, reports: dict[str, ShardReport]
) -> PackReport:
    """Write the whole journal; those of tasks go."""
    reports = {tar: reports[tar] for tar in plan.tars(directory)}
    write_journal(directory, plan, reports)
    for path in task_journals(directory):
        os.remove(path)
    total = PackReport(plan, list(reports.values()))
    assert total.utterances + len(total.dropped) == len(manifest)
    if total.utterances == 0:
        raise nothing_left(manifest, total.dropped)
    return total


def _gone(drop: Dropped) -> DataError:
    return DataError(
        f"{drop.id}: {drop.reason}: {drop.detail}; it was there when the shards were planned: is "
        "the storage away? Finished shards are kept: run the same command again when it is back, "
        "or with --drop-unreadable to leave such utterances out"
    )


def _remove_shards(directory: str, plan: Plan) -> None:
    """The journals go last: until then another --overwrite can finish the work."""
    cards = [os.path.join(directory, name) for name in journal.CARDS]
    journals = [os.path.join(directory, journal.NAME), *task_journals(directory)]
    shards = plan.tars(directory)
    for path in (*cards, *shards, *map(index_path, shards), *journals):
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

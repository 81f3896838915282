"""The file that makes packing resumable: `DIR/shards.jsonl`.

Its first line is the plan: the manifest's hash, the settings, and which part of the shuffled
manifest makes up which shard. Every finished shard adds a line.

Tasks that share the work on several hosts write a file each, `DIR/shards-00002-of-00008.jsonl`, so
that they need no locks; together they are read as one.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass, field
from typing import Any

from speechllm.data.files import write_atomically
from speechllm.data.histograms import Histograms
from speechllm.data.prepare import Dropped
from speechllm.data.shards import write_fully, writing
from speechllm.errors import DataError

NAME = "shards.jsonl"
# What tells of finished shards; see `speechllm.data.dataset_card`.
CARDS = ("dataset.json", "report.json", "report.html", "dropped.jsonl")


@dataclass(frozen=True)
class Share:
    """Task `task` (from 1) of `num_tasks` makes every num_tasks-th shard."""

    task: int
    num_tasks: int

    def of(self, tars: list[str]) -> list[str]:
        return tars[self.task - 1 :: self.num_tasks]

    @property
    def journal(self) -> str:
        return f"shards-{self.task:05d}-of-{self.num_tasks:05d}.jsonl"


@dataclass(frozen=True)
class Plan:
    """manifest: sha256. name: of the shards. settings: by name, as the user knows them. cuts: shard
    i is made of the shuffled lines cuts[i]..cuts[i + 1]. absent: ids of utterances whose audio
    could not be read even then. duplicates: by id, the earlier utterance with the same audio.
    """

    manifest: str
    name: str
    settings: dict[str, Any]
    cuts: list[int]
    absent: list[str] = field(default_factory=list)
    duplicates: dict[str, str] = field(default_factory=dict)

    def tars(self, directory: str) -> list[str]:
        count = len(self.cuts) - 1
        return [os.path.join(directory, f"{self.name}-{i:06d}.tar") for i in range(count)]


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard's share. sha256: of the tar. sample_rates: utterances by Hz (as
    text, for JSON). histograms: see `speechllm.data.histograms`. versions: of what made it."""

    shard: str
    utterances: int
    seconds: float
    bytes: int
    sha256: str
    kept: int
    sample_rates: dict[str, int]
    histograms: Histograms
    versions: dict[str, str]
    dropped: list[Dropped]


def read_journal(directory: str) -> tuple[Plan, dict[str, ShardReport]] | None:
    """The plan and the finished shards by tar, of all tasks; None where there is no plan.

    A last line that a kill has cut short is as good as none. Raises DataError for anything else
    that is no such file, and where two tasks have planned differently.
    """
    whole = os.path.join(directory, NAME)
    paths = [*([whole] if os.path.exists(whole) else []), *task_journals(directory)]
    if not paths:
        return None
    plan, reports = _read(directory, paths[0])
    for path in paths[1:]:
        other, more = _read(directory, path)
        if other != plan:
            raise DataError(
                f"{path}: plans other shards than {paths[0]}: the audio or the settings have "
                "changed in between; choose another --out, or make all anew with --overwrite"
            )
        reports |= more
    return plan, reports


def task_journals(directory: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(directory), "shards-*-of-*.jsonl")))


def _read(directory: str, path: str) -> tuple[Plan, dict[str, ShardReport]]:
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.endswith("\n")]
        reports = {}
        for record in records[1:]:
            record["dropped"] = [Dropped(**one) for one in record["dropped"]]
            record["shard"] = os.path.join(directory, record["shard"])
            reports[record["shard"]] = ShardReport(**record)
        return Plan(**records[0]), reports
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"{path}: not what make_shards writes ({error}); choose an empty directory"
        ) from error


def write_journal(
    directory: str, plan: Plan, reports: dict[str, ShardReport], name: str = NAME
) -> None:
    """Start the file anew with what is known."""
    lines = [json.dumps(vars(plan)) + "\n", *map(journal_line, reports.values())]
    write_atomically(os.path.join(directory, name), "".join(lines).encode())


def append_to_journal(directory: str, report: ShardReport, name: str = NAME) -> None:
    """Raises DataError where there is no room for it."""
    path = os.path.join(directory, name)
    with writing(path), open(path, "ab", buffering=0) as file:
        write_fully(file, [journal_line(report).encode()])
        os.fsync(file.fileno())


def journal_line(report: ShardReport) -> str:
    # dataclasses.asdict would copy every number of the histograms, by itself.
    dropped = [vars(one) for one in report.dropped]
    values = {**vars(report), "shard": os.path.basename(report.shard), "dropped": dropped}
    return json.dumps(values) + "\n"


def tars_in(directory: str) -> list[str]:
    """Raises DataError where the directory is a file."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise DataError(f"{directory}: is a file; --out must be a directory")
    return glob.glob(os.path.join(glob.escape(directory), "*.tar"))


def refuse_foreign(directory: str, foreign: list[str]) -> None:
    """Raise DataError where there are tars that no journal tells of."""
    if foreign:
        raise DataError(
            f"{directory}: holds tars that make_shards did not write "
            f"({os.path.basename(min(foreign))}, ...); choose an empty directory"
        )


def refuse_other(directory: str, found: Plan, wanted: Plan) -> None:
    """Raise DataError where the plan found is of another manifest or of other settings."""
    remedy = "choose another --out, or make them anew with --overwrite"
    if (found.manifest, found.name) != (wanted.manifest, wanted.name):
        raise DataError(f"{directory}: holds shards of another manifest; {remedy}")
    for name, value in wanted.settings.items():
        if found.settings.get(name) != value:
            raise DataError(
                f"{directory}: holds shards made with {name} {found.settings.get(name)}, "
                f"not {value}; {remedy}"
            )

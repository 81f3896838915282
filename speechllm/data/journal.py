"""The file that makes packing resumable: `DIR/shards.jsonl`.

Its first line is the plan: the manifest's hash, the settings, and which part of the shuffled
manifest makes up which shard. Every finished shard adds a line.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from speechllm.data.files import write_atomically
from speechllm.data.prepare import Dropped
from speechllm.errors import DataError

NAME = "shards.jsonl"


@dataclass(frozen=True)
class Plan:
    """manifest: sha256. name: of the shards. settings: by name, as the user knows them. cuts: shard
    i is made of the shuffled lines cuts[i]..cuts[i + 1].
    """

    manifest: str
    name: str
    settings: dict[str, Any]
    cuts: list[int]

    def tars(self, directory: str) -> list[str]:
        count = len(self.cuts) - 1
        return [os.path.join(directory, f"{self.name}-{i:06d}.tar") for i in range(count)]


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard's share. sample_rates: utterances by Hz (as text, for JSON)."""

    shard: str
    utterances: int
    seconds: float
    bytes: int
    kept: int
    sample_rates: dict[str, int]
    dropped: list[Dropped]


def read_journal(directory: str) -> tuple[Plan, dict[str, ShardReport]] | None:
    """The plan and the finished shards by tar; None where there is no plan.

    A last line that a kill has cut short is as good as none. Raises DataError for anything else
    that is no such file.
    """
    path = os.path.join(directory, NAME)
    if not os.path.exists(path):
        return None
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


def write_journal(directory: str, plan: Plan, reports: dict[str, ShardReport]) -> None:
    """Start the file anew with what is known."""
    text = json.dumps(asdict(plan)) + "\n" + "".join(journal_line(one) for one in reports.values())
    write_atomically(os.path.join(directory, NAME), text.encode())


def journal_line(report: ShardReport) -> str:
    return json.dumps({**asdict(report), "shard": os.path.basename(report.shard)}) + "\n"


def refuse_foreign(directory: str) -> None:
    """Raise DataError where the directory holds shards that no journal tells of."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise DataError(f"{directory}: is a file; --out must be a directory")
    if foreign := glob.glob(os.path.join(glob.escape(directory), "*.tar")):
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

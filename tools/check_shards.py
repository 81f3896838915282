"""Check shards: are they all there and whole, and do different splits share anything?

Each SPLIT is a directory of shards, a tar, a glob or a url. Found are: shards that dataset.json
tells of and that are not there, or whose bytes are others (sha256); builds that are not finished;
indexes that do not fit; audio that cannot be decoded (of a sample, or of all); ids that occur
twice; and, between splits, utterances with the same id, the same text or the same audio.

Exit code: 0 nothing found, 1 something found, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from rich.table import Table
from shard_console import hours, progress_bar, run, show

from speechllm.data.checking import (
    CheckTask,
    Finding,
    ShardCheck,
    check_shard,
    common_lengths,
    equal_pairs,
    repeated,
)
from speechllm.data.index import open_index
from speechllm.data.pool import available_cores, map_unordered
from speechllm.data.split_files import SplitFiles, look_at_files
from speechllm.errors import DataError

_LEAKS = ("id", "text", "audio")
_SAMPLE = 20
_MIN_WORDS = 5
_NAMED = 10


@dataclass(frozen=True)
class Split:
    """tars: whose index fits. durations: seconds, float64 [U]. checks: of the tars, once done."""

    files: SplitFiles
    tars: list[str]
    durations: np.ndarray
    checks: list[ShardCheck] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """uint64 [U]: ids, texts or audio of all utterances, in the order of the shards."""
        return np.concatenate([np.zeros(0, np.uint64), *(getattr(c, name) for c in self.checks)])

    def place(self, i: int) -> tuple[str, str]:
        """Tar and key of utterance i."""
        starts = np.cumsum([0, *(check.utterances for check in self.checks)])
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        keys = open_index(self.tars[shard]).rows.column("key")
        return self.tars[shard], keys[i - int(starts[shard])].as_py()


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    splits = [open_split(pattern) for pattern in options.splits]
    check_all(splits, options)
    findings = [finding for split in splits for finding in split.files.findings]
    for split in splits:
        findings += [finding for check in split.checks for finding in check.findings]
        findings += repeated_ids(split)
    for first, second in combinations(splits, 2):
        for kind in options.leaks:
            findings += leaks(first, second, kind)
    if options.json:
        print(json.dumps(as_values(splits, findings), indent=2, ensure_ascii=False))
    else:
        print_findings(splits, findings)
    return 1 if findings else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("splits", nargs="+", metavar="SPLIT", help="directory, tar, glob or url")
    parser.add_argument(
        "--decode",
        choices=("none", "sample", "all"),
        default="sample",
        help=f"how much audio of each shard (default sample: {_SAMPLE} utterances)",
    )
    parser.add_argument(
        "--sample", type=int, default=_SAMPLE, metavar="N", help="utterances of each shard"
    )
    parser.add_argument(
        "--leaks",
        type=_leaks,
        default=_LEAKS,
        metavar="KIND,...",
        help="what splits may not share: id, text, audio (default: all three), or none",
    )
    parser.add_argument(
        "--min-leak-words",
        type=int,
        default=_MIN_WORDS,
        metavar="N",
        help=f"texts of fewer words may be shared (default {_MIN_WORDS})",
    )
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--json", action="store_true", help="print JSON, with all findings")
    options = parser.parse_args(arguments)
    if options.sample < 1 or options.min_leak_words < 1:
        parser.error("--sample and --min-leak-words start at 1")
    return options


def _leaks(text: str) -> tuple[str, ...]:
    kinds = () if text == "none" else tuple(text.split(","))
    if not set(kinds) <= set(_LEAKS):
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {', '.join(_LEAKS)}, or none")
    return kinds


def open_split(pattern: str) -> Split:
    """Raises UserError where there is nothing to check. Indexes that do not fit are findings."""
    files = look_at_files(pattern)
    tars = []
    durations: list[np.ndarray] = [np.zeros(0)]
    for tar in files.tars:
        try:
            durations.append(np.from_dlpack(open_index(tar).rows.column("duration")).copy())
        except DataError as error:
            detail = str(error).removeprefix(f"{tar}: ")
            files.findings.append(Finding("index", tar, None, detail))
            continue
        tars.append(tar)
    return Split(files, tars, np.concatenate(durations))


def check_all(splits: Sequence[Split], options: argparse.Namespace) -> None:
    """Fill in the splits' checks."""
    compared = options.leaks if len(splits) > 1 else ()
    decode = {"none": 0, "sample": options.sample, "all": None}[options.decode]
    min_words = options.min_leak_words if "text" in compared else None
    lengths = [split.durations for split in splits]
    same_length = common_lengths(lengths) if "audio" in compared else np.zeros(0)
    tasks = [
        CheckTask(tar, split.files.sha256.get(tar), decode, min_words, same_length)
        for split in splits
        for tar in split.tars
    ]
    done: dict[int, ShardCheck] = {}
    with progress_bar() as progress:
        for i, check in map_unordered(check_shard, tasks, options.num_workers):
            done[i] = check
            progress("Checking", len(done), len(tasks))
    in_order = iter([done[i] for i in range(len(tasks))])
    for split in splits:
        split.checks.extend(next(in_order) for _ in split.tars)


def repeated_ids(split: Split) -> list[Finding]:
    findings = []
    for first, later in repeated(split.column("ids")).tolist():
        tar, key = split.place(later)
        findings.append(Finding("repeated id", tar, key, f"also in {split.place(first)[0]}"))
    return findings


def leaks(first: Split, second: Split, kind: str) -> list[Finding]:
    """What of `second` is in `first` too."""
    name = {"id": "ids", "text": "texts", "audio": "audio"}[kind]
    findings = []
    for there, here in equal_pairs(first.column(name), second.column(name)).tolist():
        (tar, key), (other_tar, other_key) = second.place(here), first.place(there)
        detail = f"the {kind} is that of {other_key} in {other_tar}"
        findings.append(Finding(f"leak by {kind}", tar, key, detail))
    return findings


def as_values(splits: Sequence[Split], findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "splits": [
            {
                "path": split.files.pattern,
                "has_dataset_json": split.files.has_card,
                "shards": len(split.tars),
                "utterances": len(split.durations),
                "hours": float(split.durations.sum()) / 3600,
                "decoded": sum(check.decoded for check in split.checks),
            }
            for split in splits
        ],
        "findings_by_kind": _by_kind(findings),
        "findings": [finding._asdict() for finding in findings],
    }


def _by_kind(findings: Sequence[Finding]) -> dict[str, int]:
    return dict(Counter(finding.kind for finding in findings).most_common())


def print_findings(splits: Sequence[Split], findings: Sequence[Finding]) -> None:
    table = Table("split", "shards", "utterances", "length", "decoded", "checksums")
    for split in splits:
        table.add_row(
            split.files.pattern,
            f"{len(split.tars):,}",
            f"{len(split.durations):,}",
            hours(float(split.durations.sum())),
            f"{sum(check.decoded for check in split.checks):,}",
            "as in dataset.json" if split.files.has_card else "unknown: no dataset.json",
        )
    show(table)
    for kind, count in _by_kind(findings).items():
        print(f"{kind}: {count:,}", file=sys.stderr)
        named = [finding for finding in findings if finding.kind == kind][:_NAMED]
        for finding in named:
            print(f"  {finding}", file=sys.stderr)
        if count > len(named):
            print(f"  and {count - len(named):,} more (see --json)", file=sys.stderr)
    if not findings:
        print("nothing found")


if __name__ == "__main__":
    run(main)

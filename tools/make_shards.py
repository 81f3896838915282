"""Make WebDataset shards and their indexes from a JSONL manifest.

Each line of the manifest is {"id", "audio", "text"} and by option start, end (seconds), channel
and any further fields, which are kept. The order is shuffled by --seed. An interrupted run goes on
with the same command. Writes into --out: NAME-000000.tar, NAME-000000.index.arrow, ...,
shards.jsonl (the plan and what is finished), report.json and dropped.jsonl (what was left out, and
why).

Several hosts share the work as `--task 1 --num-tasks N` to `--task N --num-tasks N` with the same
other options, at the same time or not; then `--check-complete` says whether every shard is there,
and writes the reports. The shards are the same files as those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from shard_console import hours, progress_bar, run, show, size

from speechllm.data.files import write_atomically
from speechllm.data.journal import Share
from speechllm.data.manifest import Manifest, read_manifest
from speechllm.data.packing import PackReport, PackSettings, complete, pack, survey_manifest
from speechllm.data.pool import available_cores
from speechllm.data.prepare import AudioSettings, Dropped
from speechllm.data.shards import parse_size
from speechllm.errors import UserError


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if "://" in options.out:
        raise UserError(f"--out {options.out}: must be a local directory; copy the shards there")
    audio = AudioSettings(options.mode, options.min_seconds, options.max_seconds)
    settings = PackSettings(options.shard_size, options.seed, audio)
    share = share_of(options)
    manifest = read_manifest(options.manifest)
    if options.check_complete:
        report = complete(manifest, options.out, settings)
        write_report(options.out, manifest, settings, report)
        print_report(options.out, report)
        return 0
    if options.dry_run:
        print_survey(manifest, settings, options.num_workers)
        return 0
    with progress_bar() as progress:
        report = pack(
            manifest,
            options.out,
            settings,
            num_workers=options.num_workers,
            overwrite=options.overwrite,
            progress=progress,
            share=share,
        )
    if share is None:
        write_report(options.out, manifest, settings, report)
    print_report(options.out, report)
    return 0


def share_of(options: argparse.Namespace) -> Share | None:
    """The task's share; None for a single process. Raises UserError for half a task."""
    if options.task is None and options.num_tasks is None:
        return None
    if options.task is None or options.num_tasks is None:
        raise UserError("--task and --num-tasks belong together, as in --task 1 --num-tasks 4")
    if not 1 <= options.task <= options.num_tasks:
        raise UserError(f"--task {options.task}: tasks are numbered 1 to {options.num_tasks}")
    if options.overwrite or options.check_complete:
        raise UserError(
            "--task goes with neither --overwrite (it would remove the shards of other tasks; "
            "remove the directory first) nor --check-complete (which is for after all tasks)"
        )
    return Share(options.task, options.num_tasks)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", help="JSONL file; relative audio paths start at its directory")
    parser.add_argument("--out", required=True, help="directory for the shards of this manifest")
    parser.add_argument(
        "--shard-size", type=_size, default="256MB", help="aimed at (default 256MB)"
    )
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--seed", type=_seed, default=0, help="of the shuffling (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="make all shards anew")
    parser.add_argument("--task", type=int, metavar="K", help="make the K-th share of the shards")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="number of shares")
    parser.add_argument(
        "--check-complete", action="store_true", help="after all tasks: is every shard there?"
    )
    parser.add_argument("--dry-run", action="store_true", help="look at the headers, write nothing")
    parser.add_argument("--min-seconds", type=float, default=0.0, help="drop shorter utterances")
    parser.add_argument("--max-seconds", type=float, help="drop longer utterances")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--keep",
        dest="mode",
        action="store_const",
        const="keep",
        help="take every decodable file as it is (default: FLAC, Opus, Ogg and MP3)",
    )
    sources.add_argument(
        "--reencode",
        dest="mode",
        action="store_const",
        const="reencode",
        help="make 16 kHz mono FLAC of every file",
    )
    parser.set_defaults(mode="auto")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; write a whole number from 0")
    return int(text)


def print_survey(manifest: Manifest, settings: PackSettings, num_workers: int) -> None:
    with progress_bar() as progress:
        survey = survey_manifest(manifest, settings, num_workers, progress)
    total = int(survey.sizes.sum())
    table = Table(title=f"{manifest.path} (nothing written)", show_header=False)
    table.add_row("utterances", f"{len(manifest) - len(survey.dropped):,}")
    table.add_row("length", hours(float(survey.seconds.sum())))
    table.add_row("size, about", size(total))
    table.add_row("shards, about", f"{-(-total // settings.shard_bytes):,}")
    for row in _drop_rows(survey.dropped):
        table.add_row(*row)
    show(table)


def write_report(out: str, manifest: Manifest, settings: PackSettings, report: PackReport) -> None:
    values = {
        "manifest": {"name": manifest.name, "sha256": manifest.sha256},
        "settings": settings.by_name(),
        "shards": len(report.shards),
        "utterances": report.utterances,
        "hours": report.seconds / 3600,
        "bytes": report.bytes,
        "kept": report.kept,
        "encoded": report.encoded,
        "sample_rates": report.sample_rates,
        "dropped": report.drops_by_reason(),
    }
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in report.dropped]
    write_atomically(os.path.join(out, "dropped.jsonl"), "".join(lines).encode())
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(os.path.join(out, "report.json"), text.encode())


def print_report(out: str, report: PackReport) -> None:
    table = Table(title=out, show_header=False)
    table.add_row("shards", f"{len(report.shards):,} ({size(report.bytes)})")
    table.add_row("utterances", f"{report.utterances:,}")
    table.add_row("length", hours(report.seconds))
    table.add_row("audio files kept as they are", f"{report.kept:,}")
    table.add_row("encoded to FLAC, 16 kHz, mono", f"{report.encoded:,}")
    for row in _drop_rows(report.dropped):
        table.add_row(*row)
    show(table)
    if report.dropped and os.path.exists(os.path.join(out, "dropped.jsonl")):
        print(f"what was dropped, and why: {os.path.join(out, 'dropped.jsonl')}")


def _drop_rows(dropped: Sequence[Dropped]) -> list[tuple[str, str]]:
    if not dropped:
        return [("dropped", "0")]
    reasons = Counter(one.reason for one in dropped)
    return [(f"dropped: {reason}", f"{count:,}") for reason, count in reasons.most_common()]


if __name__ == "__main__":
    run(main)

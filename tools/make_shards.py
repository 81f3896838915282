"""Make WebDataset shards and their indexes from speech corpora.

MANIFEST is JSONL, each line {"id", "audio", "text"} and by option start, end (seconds), channel and
any further fields, which are kept; --source takes corpora of other kinds. The order is shuffled by
--seed. An interrupted run goes on with the same command. Writes into --out: NAME-000000.tar,
NAME-000000.index.arrow, ..., shards.jsonl (the plan and what is finished), dataset.json (what the
shards are made of, with the sha256 of each), report.json and report.html (totals and histograms),
and dropped.jsonl (what was left out, and why).

Several hosts share the work as `--task 1 --num-tasks N` to `--task N --num-tasks N` with the same
other options, at the same time or not; then `--check-complete` says whether every shard is there,
and writes the reports. The shards are the same files as those of one process. `--plan-only` before
the tasks saves each of them its look at the whole source.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from shard_console import hours, progress_bar, run, show, size
from shard_options import add_shard_arguments, shard_settings
from source_options import add_source_arguments, sources_of, specs_of

from speechllm.data.dataset_card import write_cards
from speechllm.data.journal import Share
from speechllm.data.manifest import Manifest
from speechllm.data.packing import PackReport, complete, pack, prepare_plan
from speechllm.data.pool import available_cores
from speechllm.data.prepare import Dropped
from speechllm.data.surveying import PackSettings, survey_manifest
from speechllm.errors import UserError


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if "://" in options.out:
        raise UserError(f"--out {options.out}: must be a local directory; copy the shards there")
    settings = shard_settings(options)
    share = share_of(options)
    if options.options_only:
        specs_of(options)
        return 0
    manifest = sources_of(options)
    if options.check_complete:
        report = complete(manifest, options.out, settings)
        write_cards(options.out, report)
        print_report(options.out, report, is_whole=True)
        return 0
    if options.dry_run:
        print_survey(manifest, settings, options.num_workers)
        return 0
    if options.plan_only:
        print_plan(manifest, settings, options)
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
            drop_unreadable=options.drop_unreadable,
        )
    if share is None:
        write_cards(options.out, report)
    print_report(options.out, report, is_whole=share is None)
    return 0


def share_of(options: argparse.Namespace) -> Share | None:
    """The task's share; None for a single process. Raises UserError for half a task."""
    if options.task is None and options.num_tasks is None:
        return None
    if options.task is None or options.num_tasks is None:
        raise UserError("--task and --num-tasks belong together, as in --task 1 --num-tasks 4")
    if not 1 <= options.task <= options.num_tasks:
        raise UserError(f"--task {options.task}: tasks are numbered 1 to {options.num_tasks}")
    if options.overwrite or options.check_complete or options.plan_only:
        raise UserError(
            "--task goes with neither --overwrite (it would remove the shards of other tasks; "
            "remove the directory first) nor --plan-only nor --check-complete (which are for "
            "before and after all tasks)"
        )
    return Share(options.task, options.num_tasks)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source_arguments(parser)
    parser.add_argument("--out", required=True, help="directory for the shards of these sources")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--overwrite", action="store_true", help="make all shards anew")
    parser.add_argument("--dry-run", action="store_true", help="look at the audio, write nothing")
    parser.add_argument(
        "--drop-unreadable",
        action="store_true",
        help="leave out audio that can no longer be read, where the run would stop for it",
    )
    tasks = parser.add_argument_group("sharing the work")
    tasks.add_argument("--task", type=int, metavar="K", help="make the K-th share of the shards")
    tasks.add_argument("--num-tasks", type=int, metavar="N", help="number of shares")
    tasks.add_argument(
        "--options-only", action="store_true", help="before a job: are these options right?"
    )
    tasks.add_argument(
        "--plan-only", action="store_true", help="before all tasks: which utterances go where?"
    )
    tasks.add_argument(
        "--check-complete", action="store_true", help="after all tasks: is every shard there?"
    )
    add_shard_arguments(parser)
    return parser.parse_args(arguments)


def print_survey(manifest: Manifest, settings: PackSettings, num_workers: int) -> None:
    with progress_bar() as progress:
        survey = survey_manifest(manifest, settings, num_workers, progress, lengths=True)
    total = int(survey.sizes.sum())
    table = Table(title=f"{manifest.path} (nothing written)", show_header=False)
    table.add_row("utterances", f"{len(manifest) - len(survey.dropped):,}")
    table.add_row("length", hours(float(survey.seconds.sum())))
    table.add_row("size, about", size(total))
    table.add_row("shards, about", f"{-(-total // settings.shard_bytes):,}")
    for row in _drop_rows(survey.dropped):
        table.add_row(*row)
    show(table)


def print_plan(manifest: Manifest, settings: PackSettings, options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        plan = prepare_plan(
            manifest,
            options.out,
            settings,
            num_workers=options.num_workers,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"{options.out}: {len(plan.cuts) - 1:,} shards planned; none made")


def print_report(out: str, report: PackReport, *, is_whole: bool) -> None:
    encoding = report.plan.settings
    codec = "FLAC" if encoding["codec"] == "flac" else f"Opus ({encoding['bitrate']:,} bit/s)"
    table = Table(title=out, show_header=False)
    table.add_row("shards", f"{len(report.shards):,} ({size(report.bytes)})")
    table.add_row("utterances", f"{report.utterances:,}")
    table.add_row("length", hours(report.seconds))
    table.add_row("audio files kept as they are", f"{report.kept:,}")
    table.add_row(f"encoded to {codec}, 16 kHz, mono", f"{report.encoded:,}")
    for row in _drop_rows(report.dropped):
        table.add_row(*row)
    show(table)
    if is_whole and report.dropped:
        print(f"what was dropped, and why: {out}/dropped.jsonl")
    if is_whole:
        print(f"lengths, paces and levels: {out}/report.html")


def _drop_rows(dropped: Sequence[Dropped]) -> list[tuple[str, str]]:
    if not dropped:
        return [("dropped", "0")]
    reasons = Counter(one.reason for one in dropped)
    return [(f"dropped: {reason}", f"{count:,}") for reason, count in reasons.most_common()]


if __name__ == "__main__":
    run(main)

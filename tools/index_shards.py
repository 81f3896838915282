"""Make the index of tar shards that other tools have written (webdataset, tar, ...).

Beside each x.tar an x.index.arrow is written. An utterance is an audio member (KEY.flac, .wav,
.mp3, .ogg, .opus, ...) together with KEY.json (with a `text` field) or KEY.txt. A tar whose index
still fits it is left alone. Directories, globs, {000..123} ranges and urls are understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.table import Table
from shard_console import hours, progress_bar, run, show

from speechllm.data.files import list_tars
from speechllm.data.index import index_path, open_index
from speechllm.data.pool import available_cores, map_unordered
from speechllm.data.scan import IndexReport, build_index
from speechllm.errors import DataError, UserError

_NAMED = 3


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    tars = find(options.tars)
    todo = [tar for tar in tars if options.overwrite or not _is_indexed(tar)]
    reports: list[IndexReport] = []
    errors: list[str] = []
    with progress_bar() as progress:
        for _, result in map_unordered(_attempt, todo, options.num_workers):
            if isinstance(result, IndexReport):
                reports.append(result)
            else:
                errors.append(result)
            progress("Indexing", len(reports) + len(errors), len(todo))
    print_reports(sorted(reports, key=lambda report: report.tar), len(tars) - len(todo))
    for error in sorted(errors):
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", nargs="+", metavar="TAR", help="tar, directory, glob or url")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--overwrite", action="store_true", help="also where an index fits its tar")
    return parser.parse_args(arguments)


def find(patterns: Sequence[str]) -> list[str]:
    tars: set[str] = set()
    for pattern in patterns:
        found = list_tars(pattern)
        if not found:
            raise UserError(f"{pattern}: no *.tar there; name tars or a directory that holds them")
        tars.update(found)
    for tar in tars:
        index_path(tar)
    return sorted(tars)


def _is_indexed(tar: str) -> bool:
    try:
        open_index(tar)
    except DataError:
        return False
    return True


def _attempt(tar: str) -> IndexReport | str:
    """One bad tar must not keep the others from being indexed."""
    try:
        return build_index(tar)
    except DataError as error:
        return str(error)


def print_reports(reports: Sequence[IndexReport], untouched: int) -> None:
    table = Table(show_header=False)
    table.add_row("shards indexed", f"{len(reports):,}")
    table.add_row("shards whose index fits already", f"{untouched:,}")
    table.add_row("utterances", f"{sum(report.utterances for report in reports):,}")
    table.add_row("length", hours(sum(report.seconds for report in reports)))
    skipped: dict[str, list[str]] = {}
    for report in reports:
        for reason, names in report.skipped.items():
            skipped.setdefault(reason, []).extend(f"{name} in {report.tar}" for name in names)
    for reason, names in sorted(skipped.items(), key=lambda item: -len(item[1])):
        table.add_row(f"skipped: {reason}", f"{len(names):,}")
    show(table)
    for reason, names in skipped.items():
        print(f"skipped, {reason}:")
        for name in names[:_NAMED]:
            print(f"  {name}")
        if len(names) > _NAMED:
            print(f"  and {len(names) - _NAMED:,} more")


if __name__ == "__main__":
    run(main)

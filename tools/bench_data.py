"""Benchmarks of the data side, each compared within one run on this machine.

build: shards built, against the codec libraries alone. loading: audio decoded per core, against
webdataset, HF datasets and soundfile alone. planning: time and memory at millions of utterances,
and the balance of simulated ranks. JSON goes to standard output, tables to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shard_console import run

PARTS = ("build", "loading", "planning")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--utterances",
        type=lambda text: [int(float(number)) for number in text.split(",")],
        default=[1_000_000, 10_000_000],
        help="sizes to plan (default: 1e6,1e7; the second writes 0.9 GB of indexes to TMPDIR)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of build and loading (default: 5)")
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else PARTS
    console = Console(stderr=True)
    result: dict[str, Any] = {"machine": _machine()}
    # The parts import torch, webdataset and datasets, which planning must not have in memory.
    if "build" in wanted:
        from bench_build import measure_build

        result["build"] = measure_build(rounds=options.rounds)
        _show(console, "build", _rows(result["build"]["kinds"]))
    if "loading" in wanted:
        from bench_loading import measure_loading

        result["loading"] = measure_loading(rounds=options.rounds)
        _show(console, "loading", _rows(result["loading"]["contenders"]))
    if "planning" in wanted:
        from bench_planning import measure_planning, measure_ranks

        result["ranks"] = measure_ranks()
        _show(console, "simulated ranks", result["ranks"])
        result["planning"] = [measure_planning(count) for count in options.utterances]
        _show(console, "planning", result["planning"])
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return {"cpu": names[0] if names else platform.machine(), "cores": cores}


def _rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"": name, **values} for name, values in found.items()]


def _show(console: Console, title: str, rows: Iterable[dict[str, Any]]) -> None:
    """Few rows stand side by side, because the names of their values are long."""
    rows = list(rows)
    names = [name.replace("_", " ") for name in rows[0]]
    lines = [[_text(value) for value in row.values()] for row in rows]
    few = len(rows) <= 3
    table = Table(title=title, show_header=not few)
    if few:
        lines = [list(line) for line in zip(names, *lines, strict=True)]
    else:
        for name in names:
            table.add_column(name)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_text(one) for one in value)
    if isinstance(value, float) and value < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    run(main)

"""Show what is in shards: counts, hours, histograms, rates, formats, and some utterances.

--extract KEY --to FILE writes one utterance as training hears it, 16 kHz and mono; --to DIRECTORY
names the file after the key. --verify reads everything: it compares every tar with its index and
decodes every utterance (see check_shards.py for more).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import numpy as np

import pyarrow.compute as pc
import soundfile
from rich.table import Table
from shard_console import hours, progress_bar, run, show, size

from speechllm.data.checking import CheckTask, check_shard
from speechllm.data.files import file_size
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.pool import available_cores, map_unordered
from speechllm.data.shards import safe_key
from speechllm.data.store import Store
from speechllm.errors import DataError, UserError
from speechllm.types import SAMPLE_RATE

_SECONDS = (0, 1, 2, 5, 10, 15, 20, 30, 60)
_CHARACTERS = (0, 1, 10, 20, 50, 100, 200, 300, 500)
_PACES = (0, 2, 5, 8, 10, 12, 15, 20, 25, 30)
_HISTOGRAMS = {
    "seconds": "histogram",
    "characters": "characters_histogram",
    "characters per second": "characters_per_second_histogram",
}
_BAR = 30
_NAMED = 20


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    corpus = open_corpus(options.shards)
    if options.extract is not None:
        extract(corpus, options.extract, options.to, overwrite=options.overwrite)
        return 0
    summary = summarise(corpus, options.samples)
    if options.verify:
        problems = verify(corpus, options.num_workers)
        summary["problems"] = problems
    if options.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print_summary(summary)
    return 2 if summary.get("problems") else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="+", metavar="TAR_OR_DIR", help="tar, directory, glob or url"
    )
    parser.add_argument("--samples", type=int, default=3, help="utterances shown (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read and decode everything")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="for --verify")
    parser.add_argument("--extract", metavar="KEY", help="write this utterance's audio to a file")
    parser.add_argument("--to", metavar="FILE", help="where --extract writes: a.wav, a.flac, a/")
    parser.add_argument("--overwrite", action="store_true", help="a file that --extract finds")
    options = parser.parse_args(arguments)
    if (options.extract is None) != (options.to is None):
        parser.error("--extract KEY and --to FILE go together")
    return options


def summarise(corpus: Corpus, samples: int) -> dict[str, Any]:
    """What the indexes tell, and the first utterances."""
    sizes = [file_size(tar) or 0 for tar in corpus.shards]
    store = Store(corpus)
    shown = [_sample(store, i) for i in range(min(samples, len(corpus)))]
    return {
        "shards": len(corpus.shards),
        "bytes": sum(sizes),
        "utterances": len(corpus),
        "utterances_per_shard": _spread(corpus.shard_sizes),
        "hours": float(corpus.durations.sum()) / 3600,
        "seconds": _spread(corpus.durations),
        "characters": _spread(corpus.text_lengths),
        "without_text": int((corpus.text_lengths == 0).sum()),
        "histogram": _histogram(corpus.durations, _SECONDS, " s"),
        "characters_histogram": _histogram(corpus.text_lengths, _CHARACTERS),
        "characters_per_second_histogram": _histogram(
            corpus.text_lengths / np.maximum(corpus.durations, 1 / SAMPLE_RATE), _PACES
        ),
        "sample_rates": _counts(corpus, "sample_rate"),
        "audio": _counts(corpus, "audio_ext"),
        "metadata": _counts(corpus, "meta_ext"),
        "fingerprint": corpus.fingerprint,
        "samples": shown,
    }


def _sample(store: Store, i: int) -> dict[str, Any]:
    try:
        utterance = store.read(i)
    except DataError as error:
        return {"key": store.corpus.key(i), "error": str(error)}
    shown = {
        "key": utterance.key,
        "seconds": round(utterance.duration, 3),
        "text": utterance.text,
    }
    return {**shown, "fields": utterance.fields} if utterance.fields else shown


def _spread(values: np.ndarray) -> dict[str, float]:
    if len(values) == 0:
        return {}
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": float(values.max()),
    }


def _counts(corpus: Corpus, column: str) -> dict[str, int]:
    pairs = pc.value_counts(corpus.column(column)).to_pylist()
    ordered = sorted(pairs, key=lambda pair: (-pair["counts"], str(pair["values"])))
    return {str(pair["values"]): pair["counts"] for pair in ordered}


def _histogram(values: np.ndarray, edges: Sequence[int], unit: str = "") -> dict[str, int]:
    """By range."""
    counts, _ = np.histogram(values, [*edges, np.inf])
    ranges = [*(f"{a}-{b}{unit}" for a, b in pairwise(edges)), f"over {edges[-1]}{unit}"]
    return dict(zip(ranges, counts.tolist(), strict=True))


def print_summary(summary: dict[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_row("shards", f"{summary['shards']:,} ({size(summary['bytes'])})")
    table.add_row("utterances", f"{summary['utterances']:,}")
    table.add_row("per shard", _spread_text(summary["utterances_per_shard"], "{:.0f}"))
    table.add_row("length", hours(summary["hours"] * 3600))
    table.add_row("seconds", _spread_text(summary["seconds"], "{:.2f}"))
    table.add_row("characters of text", _spread_text(summary["characters"], "{:.0f}"))
    if summary["without_text"]:
        table.add_row("with empty text", f"{summary['without_text']:,}")
    for name, title in (
        ("sample_rates", "sample rates (Hz)"),
        ("audio", "audio"),
        ("metadata", "metadata"),
    ):
        table.add_row(title, ", ".join(f"{k}: {v:,}" for k, v in summary[name].items()))
    for title, name in _HISTOGRAMS.items():
        _add_histogram(table, title, summary[name])
    show(table)
    for sample in summary["samples"]:
        if "error" in sample:
            print(f"error: {sample['error']}", file=sys.stderr)
        else:
            print(f"{sample['key']} ({sample['seconds']} s): {sample['text']}")
    if "problems" in summary:
        problems = summary["problems"]
        for problem in problems[:_NAMED]:
            print(f"error: {problem}", file=sys.stderr)
        if len(problems) > _NAMED:
            print(f"error: and {len(problems) - _NAMED:,} more (see --json)", file=sys.stderr)
        if not problems:
            print("verified: every tar fits its index, every utterance decodes")


def _add_histogram(table: Table, title: str, counts: dict[str, int]) -> None:
    highest = max(counts.values())
    if highest:
        table.add_section()
        table.add_row(title, "")
    for name, count in counts.items():
        if count:
            table.add_row(f"  {name}", "█" * max(1, round(_BAR * count / highest)) + f" {count:,}")


def _spread_text(spread: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in spread.items())


def verify(corpus: Corpus, num_workers: int) -> list[str]:
    """Everything that is wrong, in the order of the shards."""
    tasks = [CheckTask(tar) for tar in corpus.shards]
    found: dict[int, list[str]] = {}
    with progress_bar() as progress:
        for i, check in map_unordered(check_shard, tasks, num_workers):
            found[i] = [str(finding) for finding in check.findings]
            progress("Verifying", len(found), len(tasks))
    return [problem for i in sorted(found) for problem in found[i]]


def extract(corpus: Corpus, key: str, target: str, *, overwrite: bool) -> None:
    """Write one utterance's audio, as training sees it: 16 kHz, mono."""
    number = -1
    for wanted in (key, safe_key(key)):
        number = pc.index(corpus.column("key"), wanted).as_py() if number < 0 else number
    if number < 0:
        raise UserError(f"no utterance {key!r} in these {len(corpus.shards)} shards")
    utterance = Store(corpus).read(number)
    if target.endswith("/"):
        os.makedirs(target, exist_ok=True)
    if os.path.isdir(target):
        # A foreign key may hold slashes and dots; as a name it must not lead out of the directory.
        target = os.path.join(target, f"{safe_key(unquote(utterance.key))}.wav")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{target}: is there already; choose another name, or say --overwrite")
    try:
        soundfile.write(target, utterance.samples, SAMPLE_RATE)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise UserError(f"{target}: cannot be written ({error}); name a .wav or .flac") from error
    print(f"{utterance.key}: {utterance.duration:.3f} s -> {target}: {utterance.text}")


if __name__ == "__main__":
    run(main)

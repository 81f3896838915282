"""Speech of a wanted length for the benchmarks: utterances joined, and their texts, as shards.

The speech is taken from shards that there are (--source), or synthesised once. The result is a
function of the arguments and the source, and is written once into a cache directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import synth_speech
from shard_console import run

from speechllm.data.audio import encode_flac
from speechllm.data.index import open_corpus
from speechllm.data.shards import Sample, write_shard
from speechllm.data.store import Store
from speechllm.errors import UserError
from speechllm.types import SAMPLE_RATE

FORMAT = 1  # raise it when the same arguments come to mean other speech
SHORTEST, LONGEST = 1.7, 15.0  # seconds; the longest grows with the mean, see `targets`
CONCENTRATION = 3.0  # of the beta distribution: broad, and skewed as its mean is
DRAWS = 20_000
CANDIDATES = 64  # among which the last piece of an utterance is chosen
POOL = 600  # utterances that are synthesised where there is no source: 20 minutes of speech
PER_SHARD = 200
MARKER = "bench_speech.json"
EXAMPLES = """\
examples:
  python tools/bench_speech.py --mean-seconds 6.5 --count 240
  python tools/bench_speech.py --mean-seconds 11 --count 240 --source exp/demo_data/shards/train

prints the directory of the shards, for data.train.
"""


def speech_shards(
    mean_seconds: float,
    count: int,
    *,
    seed: int = 0,
    source: Sequence[str] = (),
    cache: Path | None = None,
) -> Path:
    """The directory of shards with `count` utterances of about `mean_seconds` on average, made
    first if need be. source: directories or globs of shards; none: speech is synthesised.

    Raises UserError for lengths that cannot be had, DataError where the source cannot be read.
    """
    if count < 1:
        raise UserError(f"{count} utterances of speech are asked for; ask for 1 or more")
    wanted_T = targets(mean_seconds, count, seed)
    cache = default_cache() if cache is None else cache
    cache.mkdir(parents=True, exist_ok=True)
    source = source or [str(_synthesised(cache))]
    corpus = open_corpus(source)
    facts = [FORMAT, mean_seconds, count, seed, corpus.fingerprint]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    directory = cache / f"{mean_seconds:g}s-{count}-{digest}"
    if (directory / MARKER).is_file():
        return directory
    store = Store(corpus)
    parts = joins(corpus.durations.tolist(), wanted_T, seed)
    aside = cache / f".{directory.name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        for first in range(0, count, PER_SHARD):
            samples = _joined(store, parts, range(first, min(count, first + PER_SHARD)))
            write_shard(str(aside / f"speech-{first // PER_SHARD:06d}.tar"), samples)
        seconds = [sum(corpus.durations[part].tolist()) for part in parts]
        about = {"mean_seconds": mean_seconds, "seed": seed, **summary(seconds)}
        (aside / MARKER).write_text(json.dumps(about) + "\n", encoding="utf-8")
        if not directory.exists():
            os.rename(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def default_cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "speechllm" / "bench_speech"


def targets(mean_seconds: float, count: int, seed: int) -> list[float]:
    """Wanted lengths in seconds, in random order: evenly spaced quantiles of a beta distribution
    between 1.7 s and 15 s, or 1.5 times the mean where that is more. About a mean of 6.5 s they are
    spread over all of that; about 11 s most are long, as in LibriSpeech.

    Raises UserError for a mean outside of 2 to 30 s.
    """
    if not 2 <= mean_seconds <= 30:
        raise UserError(f"a mean of {mean_seconds:g} s: give 2 to 30 s")
    longest = max(LONGEST, 1.5 * mean_seconds)
    middle = (mean_seconds - SHORTEST) / (longest - SHORTEST)
    draw = random.Random(f"lengths {seed}")
    alpha, beta = CONCENTRATION * middle, CONCENTRATION * (1 - middle)
    drawn = sorted(draw.betavariate(alpha, beta) for _ in range(DRAWS))
    chosen = [drawn[int((i + 0.5) * DRAWS / count)] for i in range(count)]
    draw.shuffle(chosen)
    return [SHORTEST + (longest - SHORTEST) * part for part in chosen]


def joins(durations: Sequence[float], wanted: Sequence[float], seed: int) -> list[list[int]]:
    """For each wanted length, which utterances to join. They are taken in random order, and in
    another one again when few are left."""
    draw = random.Random(f"joins {seed}")
    longest = max(durations)
    unused: list[int] = []
    parts = []
    for length in wanted:
        part: list[int] = []
        missing = length
        while not part or missing > 0:
            if len(unused) < CANDIDATES:
                again = list(range(len(durations)))
                draw.shuffle(again)
                unused = again + unused
            if missing > longest:
                piece = len(unused) - 1
            else:  # the piece that ends the utterance
                near = range(max(0, len(unused) - CANDIDATES), len(unused))
                piece = min(near, key=lambda i: abs(durations[unused[i]] - missing))
                if part and durations[unused[piece]] >= 2 * missing:
                    break  # further away with it than without
            missing -= durations[unused[piece]]
            part.append(unused.pop(piece))
        parts.append(part)
    return parts


def _joined(store: Store, parts: Sequence[Sequence[int]], which: range) -> Iterator[Sample]:
    for number in which:
        spoken = [store.read(i) for i in parts[number]]
        samples = np.concatenate([one.samples for one in spoken])
        key = f"joined-{number:06d}"
        metadata = {"id": key, "text": " ".join(one.text.strip() for one in spoken)}
        seconds = len(samples) / SAMPLE_RATE
        yield Sample(key, encode_flac(samples), "flac", metadata, seconds, SAMPLE_RATE)


def _synthesised(cache: Path) -> Path:
    """Shards of short synthetic utterances, by the engine of tools/synth_speech.py."""
    speech = cache / f"synthetic-{POOL}"
    if (speech / MARKER).is_file():
        return speech
    print(f"synthesising {POOL} utterances", file=sys.stderr)
    items = synth_speech.plan(POOL, 0)
    aside = cache / f".{speech.name}-{secrets.token_hex(4)}"
    try:
        wanted = synth_speech.settings(items, POOL, 0, "library")
        synth_speech.synthesise(aside / "speech", items, wanted, os.cpu_count() or 1)
        (aside / "shards").mkdir()
        samples = _as_samples(aside / "speech", items)
        write_shard(str(aside / "shards" / "speech-000000.tar"), samples)
        (aside / "shards" / MARKER).write_text("{}\n", encoding="utf-8")
        if not speech.exists():
            os.rename(aside / "shards", speech)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return speech


def _as_samples(speech: Path, items: Sequence[synth_speech.Item]) -> Iterator[Sample]:
    lines: dict[str, float] = {}
    for split in synth_speech.SPLITS:
        for line in (speech / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            lines[fields["id"]] = fields["duration"]
    for item in items:
        audio = (speech / synth_speech.audio_name(item)).read_bytes()
        metadata = {"id": item.id, "text": item.text}
        yield Sample(item.id, audio, "flac", metadata, lines[item.id], SAMPLE_RATE)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Lengths in seconds."""
    return {
        "utterances": len(seconds),
        "mean": round(sum(seconds) / len(seconds), 2),
        "shortest": round(min(seconds), 2),
        "longest": round(max(seconds), 2),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mean-seconds", type=float, default=6.5, help="2 to 30 (default: 6.5)")
    parser.add_argument("--count", type=int, default=240, help="utterances (default: 240)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--source", action="append", default=[], metavar="SHARDS", help="directory or glob"
    )
    parser.add_argument("--cache", type=Path, help=f"directory (default: {default_cache()})")
    options = parser.parse_args(arguments)
    directory = speech_shards(
        options.mean_seconds,
        options.count,
        seed=options.seed,
        source=options.source,
        cache=options.cache,
    )
    print((directory / MARKER).read_text(encoding="utf-8").strip(), file=sys.stderr)
    print(directory)
    return 0


if __name__ == "__main__":
    run(main)

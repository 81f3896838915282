"""How fast shards are built, against what the codec libraries alone need for the same files.

The limit is a loop that reads each file with soundfile and, where the build encodes, writes it with
soundfile to memory: nothing is checked, hashed or stored. Where the build decodes FLAC by miniaudio
(`flac_by`) it may need less than that. Both are timed in turns, in CPU seconds. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import soundfile
from shard_console import run
from shard_options import add_shard_arguments, shard_settings

from speechllm.data.dataset_card import write_cards
from speechllm.data.encoding import encode_opus
from speechllm.data.flac import decoder_name
from speechllm.data.packing import PackReport, pack
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.surveying import PackSettings
from speechllm.data.versions import versions
from speechllm.types import SAMPLE_RATE

_WORDS = ("a", "call", "kitchen", "light", "of", "seven", "the", "tomorrow", "turn", "wonderful")
_CHARACTERS_PER_SECOND = 14
# What is built from which files: (extension of the sources, options of make_shards.py).
_KINDS = {
    "flac to flac": ("flac", ["--reencode"]),
    "wav to flac": ("wav", []),
    "flac as it is": ("flac", []),
    "wav to opus": ("wav", ["--codec", "opus", "--bitrate", "24k"]),
}


def measure_build(
    *,
    utterances: int = 300,
    seconds: tuple[float, float] = (2.0, 16.0),
    rounds: int = 5,
    num_workers: int = 1,
    kinds: Sequence[str] = ("flac to flac", "wav to flac", "flac as it is"),
    folder: str | None = None,
) -> dict[str, Any]:
    """Build shards of noise that is as hard to code as speech, in a temporary directory.

    Gives, for each kind, utterances and audio hours per core second, shards per core second at the
    default shard size, and `share_of_limit`: the codecs' CPU time by that of the build, where each
    build is compared with the mean of the codecs' runs before and after it; the median of rounds.
    """
    results = {}
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        for kind in kinds:
            extension, options = _KINDS[kind]
            source = Path(directory) / extension
            if not source.exists():
                write_source(source, extension, utterances, seconds)
            results[kind] = _measure(source, options, rounds, num_workers)
            print(f"{kind}: {results[kind]['share_of_limit']:.3f} of the limit", file=sys.stderr)
    return {
        "utterances": utterances,
        "seconds": list(seconds),
        "rounds": rounds,
        "num_workers": num_workers,
        "versions": versions(),
        "flac_by": decoder_name(),
        "kinds": results,
    }


def write_source(
    directory: Path, extension: str, utterances: int, seconds: tuple[float, float]
) -> None:
    """Audio files and `train.jsonl`."""
    rng = np.random.default_rng(5)
    directory.mkdir(parents=True)
    lines = []
    for i in range(utterances):
        samples = speech_like(rng.uniform(*seconds), rng)
        soundfile.write(directory / f"{i:06d}.{extension}", samples, SAMPLE_RATE, subtype="PCM_16")
        characters = _CHARACTERS_PER_SECOND * len(samples) / SAMPLE_RATE
        words = rng.choice(_WORDS, size=max(1, round(characters / 5)))
        line = {"id": f"utt-{i:06d}", "audio": f"{i:06d}.{extension}", "text": " ".join(words)}
        lines.append(json.dumps({**line, "speaker": f"s{i % 50}", "lang": "en"}) + "\n")
    (directory / "train.jsonl").write_text("".join(lines))


def speech_like(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """int16 [N]: a buzz of changing pitch in low noise, louder and softer four times a second."""
    count = round(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    buzz = np.zeros(count)
    for harmonic in range(1, 25):
        buzz += np.sin(harmonic * phase + rng.uniform(0, 6)) / harmonic
    hiss = np.convolve(rng.standard_normal(count), [0.5, 0.3, 0.2], "same")
    loudness = np.clip(np.sin(2 * np.pi * 4 * time) + 0.4, 0.01, None)
    wave = (0.12 * buzz + 0.03 * hiss) * loudness + 0.001 * rng.standard_normal(count)
    return np.clip(wave * 32767, -32768, 32767).astype(np.int16)


def _measure(source: Path, options: Sequence[str], rounds: int, num_workers: int) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_shard_arguments(parser)
    settings = shard_settings(parser.parse_args(options))
    files = sorted(str(path) for path in source.iterdir() if path.suffix != ".jsonl")
    out = source.parent / "out"
    # The first round warms the page cache and the libraries up, and does not count.
    codecs_alone(files, settings)
    build_all(source, out, settings, num_workers)
    limits, builds = [_cpu_seconds(lambda: codecs_alone(files, settings))[0]], []
    for _ in range(rounds):
        shutil.rmtree(out)
        build, report = _cpu_seconds(lambda: build_all(source, out, settings, num_workers))
        builds.append(build)
        limits.append(_cpu_seconds(lambda: codecs_alone(files, settings))[0])
    shutil.rmtree(out)
    shares = [(a + b) / 2 / build for (a, b), build in zip(pairwise(limits), builds, strict=True)]
    build = statistics.median(builds)
    return {
        "shards": len(report.shards),
        "utterances": report.utterances,
        "hours": report.seconds / 3600,
        "bytes": report.bytes,
        "limit_core_seconds": statistics.median(limits),
        "build_core_seconds": build,
        "utterances_per_core_second": report.utterances / build,
        "audio_hours_per_core_hour": report.seconds / build,
        "shards_per_core_second": report.bytes / settings.shard_bytes / build,
        "share_of_limit": statistics.median(shares),
        "share_of_limit_by_round": shares,
    }


def codecs_alone(files: Sequence[str], settings: PackSettings) -> None:
    encoding = settings.prepare.encoding
    for path in files:
        samples, rate = soundfile.read(path, dtype="int16")
        if encoding.codec == "opus":
            encode_opus(samples, encoding.bitrate)
        elif settings.prepare.mode == "reencode" or not path.endswith(".flac"):
            soundfile.write(io.BytesIO(), samples, rate, format="FLAC", subtype="PCM_16")


def build_all(source: Path, out: Path, settings: PackSettings, num_workers: int) -> PackReport:
    """What make_shards.py does after its imports."""
    manifest = read_sources([f"jsonl:{source / 'train.jsonl'}"], SourceOptions())
    report = pack(
        manifest,
        str(out),
        settings,
        num_workers=num_workers,
        overwrite=False,
        progress=lambda what, done, total: None,
    )
    write_cards(str(out), report)
    return report


def _cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Of this process and of those that it has waited for."""
    before = _used()
    result = work()
    return _used() - before, result


def _used() -> float:
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in every)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=300, help="of each kind of source")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default 5)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes of the build")
    parser.add_argument(
        "--kinds",
        type=lambda text: tuple(text.split(",")),
        default=tuple(_KINDS)[:3],
        help=f"comma-separated, of: {', '.join(_KINDS)} (default: the first three)",
    )
    parser.add_argument("--folder", default=os.environ.get("TMPDIR"), help="for temporary files")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(_KINDS):
        parser.error(f"--kinds: no {', '.join(sorted(unknown))}")
    result = measure_build(
        utterances=options.utterances,
        rounds=options.rounds,
        num_workers=options.num_workers,
        kinds=options.kinds,
        folder=options.folder,
    )
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run(main)

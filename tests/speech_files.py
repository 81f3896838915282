"""Small speech corpora for tests: noise-and-tone audio with random words as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import soundfile

from speechllm.data.audio import encode_flac
from speechllm.data.shards import Sample, safe_key, write_shard
from speechllm.types import SAMPLE_RATE

SENTENCE = "zero one two three four five turn on off the light in kitchen call anna bob tomorrow"
WORDS = tuple(SENTENCE.split(" "))


def tone(seconds: float, *, seed: int = 0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """int16 [N]: a tone in noise, different for every seed."""
    rng = np.random.default_rng([7, seed])
    time = np.arange(max(1, round(seconds * rate))) / rate
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 800) * time) + 0.02 * rng.standard_normal(
        len(time)
    )
    return np.clip(wave * 32767, -32768, 32767).astype(np.int16)


def sentence(rng: np.random.Generator, words: tuple[int, int] = (1, 6)) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(words[0], words[1] + 1)))


def lengths_and_texts(
    count: int, *, seed: int, seconds: tuple[float, float], words: tuple[int, int] = (1, 6)
) -> list[tuple[float, str]]:
    rng = np.random.default_rng([11, seed])
    return [(float(rng.uniform(*seconds)), sentence(rng, words)) for _ in range(count)]


def write_corpus(
    directory: Path | str,
    count: int,
    *,
    seed: int = 0,
    seconds: tuple[float, float] = (0.3, 2.0),
    rate: int = SAMPLE_RATE,
    channels: int = 1,
    extension: str = "flac",
    subtype: str | None = None,
    name: str = "train",
    fields: dict[str, Any] | None = None,
) -> Path:
    """Audio files and a JSONL manifest DIRECTORY/NAME.jsonl (returned) with paths relative to it.

    ids are utt-00000, utt-00001, ...; `fields` are put into every line besides.
    """
    directory = Path(directory)
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (length, text) in enumerate(lengths_and_texts(count, seed=seed, seconds=seconds)):
        audio = f"audio/{name}-{i:05d}.{extension}"
        samples = tone(length, seed=seed * 100_003 + i, rate=rate)
        if channels > 1:
            samples = np.stack([samples] * channels, axis=1)
        kind = {"opus": "OGG"}.get(extension)
        soundfile.write(directory / audio, samples, rate, format=kind, subtype=subtype)
        line = {"id": f"utt-{i:05d}", "audio": audio, "text": text, **(fields or {})}
        lines.append(json.dumps(line, ensure_ascii=False))
    manifest = directory / f"{name}.jsonl"
    manifest.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return manifest


def make_sample(key: str, text: str, seconds: float, *, seed: int = 0, **fields: Any) -> Sample:
    samples = tone(seconds, seed=seed)
    metadata = {"id": key, "text": text, **fields}
    duration = len(samples) / SAMPLE_RATE
    return Sample(safe_key(key), encode_flac(samples), "flac", metadata, duration, SAMPLE_RATE)


def write_shards(
    directory: Path | str,
    count: int,
    *,
    num_shards: int = 1,
    seed: int = 0,
    seconds: tuple[float, float] = (0.3, 2.0),
    words: tuple[int, int] = (1, 6),
    texts: Sequence[str] | None = None,
    name: str = "train",
    **fields: Any,
) -> Path:
    """`count` utterances in `num_shards` shards with indexes; the directory, for `data.train`.

    Shards are NAME-000000.tar, ...; keys utt-00000, ... in order over the shards. `texts` replaces
    the random sentences. More shards than utterances leave the last ones empty.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = lengths_and_texts(count, seed=seed, seconds=seconds, words=words)
    samples = [
        make_sample(
            f"utt-{i:05d}",
            text if texts is None else texts[i],
            length,
            seed=seed * 100_003 + i,
            **fields,
        )
        for i, (length, text) in enumerate(drawn)
    ]
    per_shard = -(-count // num_shards)
    for shard in range(num_shards):
        part = samples[shard * per_shard : (shard + 1) * per_shard]
        write_shard(str(directory / f"{name}-{shard:06d}.tar"), part)
    return directory

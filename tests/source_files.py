"""Reading a corpus that a test has written, through the same door as make_shards."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import soundfile
from speech_files import tone

from speechllm.data.reference import load_samples
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.sources.utterance import Access, SourceUtterance, decode_line


class Corpus:
    """What `read_sources` makes of one or more texts."""

    def __init__(self, *specs: str, **options: Any) -> None:
        manifest = read_sources(specs, SourceOptions(**options))
        lines = [decode_line(manifest.line(i)) for i in range(len(manifest))]
        self.manifest = manifest
        self.access: Access = manifest.access
        self.utterances: dict[str, SourceUtterance] = {one.id: one for one in lines}
        assert list(self.utterances) == list(manifest.ids)

    def __getitem__(self, name: str) -> SourceUtterance:
        return self.utterances[name]

    def samples(self, name: str) -> np.ndarray:
        return load_samples(self[name], self.access)

    @property
    def texts(self) -> dict[str, str | None]:
        return {name: one.text for name, one in self.utterances.items()}


def write_tone(
    path: Path, seconds: float, *, seed: int = 0, rate: int = 16000, **options: Any
) -> np.ndarray:
    """int16 [N], as written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(seconds, seed=seed, rate=rate)
    soundfile.write(path, samples, rate, **options)
    return samples


def write_lines(path: Path, lines: Iterable[str | dict[str, Any]]) -> Path:
    """Text, or JSON; gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    content = "".join(f"{text}\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path

"""What can be wrong with shards that are there: their bytes, their index, their audio, and what
different splits have in common."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from speechllm.data.cleaning import audio_hash, strip_punctuation
from speechllm.data.files import open_binary
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.members import parse_metadata
from speechllm.data.scan import scan_tar
from speechllm.data.store import Store
from speechllm.errors import DataError
from speechllm.types import SAMPLE_RATE

_BLOCK = 1 << 20
# The header of a variable-rate MP3 only estimates its length.
_MP3_SLACK = 0.1
_INDEX_REMEDY = "rebuild it with: python tools/index_shards.py --overwrite"


class Finding(NamedTuple):
    """kind: one of few. where: a shard or a directory. key: of the utterance, if it is one."""

    kind: str
    where: str
    key: str | None
    detail: str

    def __str__(self) -> str:
        where = self.where if self.key is None else f"{self.key} in {self.where}"
        return f"{where}: {self.detail}"


@dataclass(frozen=True)
class CheckTask:
    """One shard to check. sha256: what it should have, None where nobody knows. decode: how many
    utterances, evenly spaced; None for all. min_words: texts of at least so many are hashed; None
    for no text. same_length: hash the audio of these durations (float64, ascending, seconds).
    """

    tar: str
    sha256: str | None = None
    decode: int | None = None
    min_words: int | None = None
    same_length: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class ShardCheck:
    """ids, texts, audio: uint64 [U], hashes by which utterances of different shards can be
    compared; 0 where there is none."""

    tar: str
    utterances: int
    decoded: int
    findings: list[Finding]
    ids: np.ndarray
    texts: np.ndarray
    audio: np.ndarray


def check_shard(task: CheckTask) -> ShardCheck:
    """Everything that is wrong with one shard, and the hashes of its utterances."""
    try:
        corpus = open_corpus([task.tar])
    except DataError as error:
        return _unusable(Finding("index", task.tar, None, _without(task.tar, error)))
    findings: list[Finding] = []
    try:
        if task.sha256 is not None and sha256_of(task.tar) != task.sha256:
            detail = "its bytes are not those that were written (sha256 differs); copy it again"
            findings.append(Finding("checksum", task.tar, None, detail))
        findings += _against_index(corpus)
    except DataError as error:
        findings.append(Finding("tar", task.tar, None, _without(task.tar, error)))
    except OSError as error:
        findings.append(Finding("tar", task.tar, None, f"cannot be read ({error})"))
    count = len(corpus)
    ids = np.array([_hash(unquote(corpus.key(i))) for i in range(count)], np.uint64)
    texts, audio = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    chosen = _chosen(count, task.decode)
    chosen |= np.isin(corpus.durations, task.same_length)
    store = Store(corpus)
    for i in range(count):
        if not chosen[i] and task.min_words is None:
            continue
        try:
            if chosen[i]:
                utterance = store.read(i)
                text = utterance.text
                audio[i] = audio_hash(utterance.samples)[0]
                findings += _wrong_length(corpus, i, utterance.duration)
            else:
                place = corpus.location(i)
                text = parse_metadata(store.read_raw(place)[1], place.meta_ext)[0]
        except DataError as error:
            where = corpus.location(i)
            detail = str(error).removeprefix(f"{where.key} in {where.shard}: ")
            findings.append(Finding("utterance", task.tar, where.key, detail))
            continue
        if task.min_words is not None:
            texts[i] = _text_hash(text, task.min_words)
    store.close()
    return ShardCheck(task.tar, count, int(chosen.sum()), findings, ids, texts, audio)


def sha256_of(url: str) -> str:
    """Of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with open_binary(url) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def common_lengths(splits: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [U] for each split -> the durations (seconds, ascending) that more than one split
    has: only such utterances can have the same audio."""
    lengths = np.concatenate([np.unique(split) for split in splits])
    found, counts = np.unique(lengths, return_counts=True)
    return found[counts > 1]


def equal_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """uint64 [A], uint64 [B] -> int64 [P, 2]: for every value of `second` that `first` has too, a
    place in `first` (the earliest) and its place in `second`. 0 equals nothing."""
    values, places = np.unique(first, return_index=True)
    rows = np.flatnonzero(np.isin(second, values) & (second != 0))
    return np.stack([places[np.searchsorted(values, second[rows])], rows], axis=1)


def repeated(values: np.ndarray) -> np.ndarray:
    """uint64 [U] -> int64 [P, 2]: the first place and each later place of values that repeat."""
    _, places, inverse = np.unique(values, return_index=True, return_inverse=True)
    first = places[inverse]
    later = np.flatnonzero(first != np.arange(len(values)))
    return np.stack([first[later], later], axis=1)


def _chosen(count: int, decode: int | None) -> np.ndarray:
    """bool [U]: `decode` of so many, evenly spaced from the first to the last."""
    if decode is None or decode >= count:
        return np.ones(count, bool)
    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count - 1, decode).round().astype(int)] = True
    return chosen


def _against_index(corpus: Corpus) -> list[Finding]:
    """Compare one tar's members with its index. Raises DataError for a damaged tar, and OSError."""
    (tar,) = corpus.shards
    with open_binary(tar) as file:
        rows, skipped = scan_tar(tar, file)
    findings = [
        Finding("tar", tar, name, reason) for reason, names in skipped.items() for name in names
    ]
    scanned = {(row.key, row.audio.offset, row.audio.size, row.metadata.offset) for row in rows}
    locations = [corpus.location(i) for i in range(len(corpus))]
    indexed = {(at.key, at.audio_offset, at.audio_size, at.meta_offset) for at in locations}
    for key, *_ in sorted(scanned - indexed):
        findings.append(Finding("index", tar, key, f"not in the index; {_INDEX_REMEDY}"))
    for key, *_ in sorted(indexed - scanned):
        findings.append(Finding("index", tar, key, f"not as the index says; {_INDEX_REMEDY}"))
    return findings


def _wrong_length(corpus: Corpus, i: int, duration: float) -> list[Finding]:
    place = corpus.location(i)
    slack = _MP3_SLACK * duration if place.audio_ext == "mp3" else 0.0
    if abs(duration - corpus.durations[i]) <= slack + 0.5 / SAMPLE_RATE:
        return []
    detail = f"{duration:.3f} s, its header and index say {corpus.durations[i]:.3f} s"
    return [Finding("utterance", place.shard, place.key, detail)]


def _text_hash(text: str, min_words: int) -> int:
    """Punctuation, case and spaces make no other text."""
    words = re.split(r"\s+", strip_punctuation(text).casefold().strip())
    return _hash(" ".join(words)) if len(words) >= min_words else 0


def _hash(text: str) -> int:
    """64 bits, not 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _without(tar: str, error: DataError) -> str:
    return str(error).removeprefix(f"{tar}: ")


def _unusable(finding: Finding) -> ShardCheck:
    none = np.zeros(0, np.uint64)
    return ShardCheck(finding.where, 0, 0, [finding], none, none, none)

"""Numbers drawn for utterances: pure functions of (seed, epoch, key), vectorised over a corpus.

A key counts, not its place: re-sharding a corpus changes no draw. All of it is arithmetic on 64-bit
words, so every version of numpy, every machine and every process gives the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

import pyarrow as pa

_WORD = 8
_SHARDS_AT_ONCE = 256


def hash_keys(keys: pa.Array | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """uint64 [U], one for each key. 0.2 s for a million keys of 20 bytes."""
    if isinstance(keys, pa.ChunkedArray):
        chunks = keys.chunks
        groups = [chunks[i : i + _SHARDS_AT_ONCE] for i in range(0, len(chunks), _SHARDS_AT_ONCE)]
        hashed = [hash_keys(pa.concat_arrays(group)) for group in groups]
        return np.concatenate([np.empty(0, np.uint64), *hashed])
    if not isinstance(keys, pa.Array):
        keys = pa.array(keys, pa.string())
    if not len(keys):
        return np.empty(0, np.uint64)
    _, offsets, data = keys.buffers()
    ends = np.frombuffer(offsets, np.int32)[keys.offset : keys.offset + len(keys) + 1]
    text = np.zeros(int(ends[-1]) + _WORD, np.uint8)
    if data is not None:
        text[: ends[-1]] = np.frombuffer(data, np.uint8, int(ends[-1]))
    # The eight bytes from every position on, as words that overlap.
    words = np.ndarray((len(text) - _WORD + 1,), "<u8", buffer=text, strides=(1,))
    starts, lengths = ends[:-1].astype(np.int64), np.diff(ends).astype(np.int64)
    hashes = _mix(lengths.astype(np.uint64))
    reach = 0
    alive = np.flatnonzero(lengths > 0)
    while len(alive):
        left = np.minimum(lengths[alive] - reach, _WORD).astype(np.uint64)
        kept = np.uint64(2**64 - 1) >> (np.uint64(8) * (np.uint64(_WORD) - left))
        hashes[alive] = _mix(hashes[alive] ^ (words[starts[alive] + reach] & kept))
        reach += _WORD
        alive = alive[lengths[alive] > reach]
    return hashes


def uniforms(seed: int, epoch: int, hashes: np.ndarray, streams: Sequence[str]) -> np.ndarray:
    """float64 [U, S] in [0, 1): an independent number for each utterance and each named stream."""
    salts = _salts(seed, epoch, tuple(streams))
    raw = _mix(_mix(hashes[:, None] + salts) ^ salts)
    return (raw >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=64)
def _salts(seed: int, epoch: int, streams: tuple[str, ...]) -> np.ndarray:
    names = (f"{seed}/{epoch}/{stream}".encode() for stream in streams)
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

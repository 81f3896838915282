"""The index beside each shard, and the corpus that many of them make.

`x.tar` has `x.index.arrow`: an Arrow IPC file with one row per utterance (see SCHEMA), whose schema
metadata hold the format's version, the tar's size, and a hash of some of its header blocks, so
that an index that no longer fits its tar is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import pyarrow as pa

from speechllm.data.cache import BlockCache
from speechllm.data.files import (
    file_size,
    file_stamp,
    list_tars,
    local_path,
    open_binary,
    read_bytes,
    write_atomically,
)
from speechllm.data.members import Row
from speechllm.data.remote import Stat, is_http, stat
from speechllm.data.shared import SHARED_UTTERANCES, shared_arrays
from speechllm.errors import DataError

VERSION = "1"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("audio_offset", pa.int64()),
        ("audio_size", pa.int64()),
        ("audio_ext", pa.string()),
        ("meta_offset", pa.int64()),
        ("meta_size", pa.int64()),
        ("meta_ext", pa.string()),
        ("duration", pa.float64()),  # seconds
        ("sample_rate", pa.int32()),  # Hz, of the member as it is stored
        ("text_length", pa.int32()),  # characters
    ]
)
# 8 utterances, 16 header blocks: 64 would cost a corpus of 1,000 shards on a network file system
# a minute at every start, and a changed tar nearly always shows in its size already.
_HASHED_ROWS = 8
_HEADER = 512
_OPENING_THREADS = 16
_OPEN_INDEXES = 1024
_INDEX_BYTES = 64  # a row takes 70 to 100
_SUMMARY_VERSION = "1"


class Location(NamedTuple):
    """Where an utterance lies: tar, key, and byte ranges within the tar."""

    shard: str
    key: str
    audio_offset: int
    audio_size: int
    audio_ext: str
    meta_offset: int
    meta_size: int
    meta_ext: str


@dataclass(frozen=True)
class ShardIndex:
    """One opened index. rows: an Arrow record batch of SCHEMA."""

    tar: str
    rows: Any
    tar_size: int
    header_hash: str


def index_path(tar: str) -> str:
    """`x.tar` -> `x.index.arrow`. Raises DataError for names that are not `*.tar`."""
    if not tar.endswith(".tar"):
        raise DataError(
            f"{tar}: shards are plain `.tar` files, because samples are read at random from them; "
            "unpack a compressed one first (e.g. gunzip x.tar.gz) or rename it to .tar"
        )
    return tar.removesuffix(".tar") + ".index.arrow"


def write_index(
    path: str, rows: Sequence[Row], tar_size: int, read_at: Callable[[int, int], bytes]
) -> None:
    """Write an index whole or not at all. read_at(offset, size) reads from the tar."""
    columns = [
        [row.key for row in rows],
        [row.audio.offset for row in rows],
        [row.audio.size for row in rows],
        [row.audio_ext for row in rows],
        [row.metadata.offset for row in rows],
        [row.metadata.size for row in rows],
        [row.metadata_ext for row in rows],
        [row.audio.duration for row in rows],
        [row.audio.sample_rate for row in rows],
        [row.metadata.text_length for row in rows],
    ]
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
    write_batch(path, pa.record_batch(arrays, schema=SCHEMA), tar_size, read_at)


def write_batch(
    path: str, batch: pa.RecordBatch, tar_size: int, read_at: Callable[[int, int], bytes]
) -> None:
    """`write_index` of rows that are an Arrow record batch of SCHEMA already."""
    metadata = {
        "version": VERSION,
        "tar_size": str(tar_size),
        "header_hash": _header_hash(batch, read_at),
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA.with_metadata(metadata)) as writer:
        writer.write_batch(batch)
    write_atomically(path, sink.getvalue().to_pybytes())


def open_index(
    tar: str, cache: BlockCache | None = None, *, verify_headers: bool = True
) -> ShardIndex:
    """The index of one shard, memory-mapped where it is local, checked against its tar.

    verify_headers: look into a local tar too, and not only at its size.
    Raises DataError where tar or index is missing, or they do not fit each other.
    """
    path = index_path(tar)
    remedy = f"build it with: python tools/index_shards.py {tar}"
    if is_http(tar):  # where nothing can be written
        remedy = "index a copy with tools/index_shards.py and put the index beside the tar there"
    try:
        size = file_size(tar)
    except OSError as error:
        raise DataError(f"{tar}: no such shard ({error})") from error
    try:
        local = local_path(path)
        source = pa.memory_map(local) if local else pa.BufferReader(_read_remote(path, cache))
        with source, pa.ipc.open_file(source) as reader:
            schema = reader.schema
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        # The mapping outlives the file, so that a corpus of any size holds no file descriptors.
    except FileNotFoundError as error:
        raise DataError(f"{tar}: has no index {path}; {remedy}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable index ({error}); {remedy}") from error
    metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    if metadata.get("version") != VERSION or not schema.equals(SCHEMA) or len(batches) != 1:
        raise DataError(f"{path}: not an index of version {VERSION}; {remedy}")
    index = ShardIndex(tar, batches[0], int(metadata["tar_size"]), metadata["header_hash"])
    _check_fresh(index, size, remedy, verify_headers)
    return index


def _read_remote(url: str, cache: BlockCache | None) -> bytes:
    if cache is None or (about := stat(url)).size is None:
        return read_bytes(url)
    return cache.read(url, about, 0, about.size)


def _check_fresh(index: ShardIndex, size: int | None, remedy: str, verify_headers: bool) -> None:
    tar = index.tar
    if size is not None and size < index.tar_size:
        raise DataError(
            f"{tar}: {size} bytes where its index says {index.tar_size}: the tar is truncated or "
            f"still being copied; copy it again, or, if it was made anew, {remedy}"
        )
    stale = size is not None and size != index.tar_size
    if verify_headers and not stale and local_path(tar) is not None:
        with open_binary(tar) as file:

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            stale = _header_hash(index.rows, read_at) != index.header_hash
    if stale:
        raise DataError(f"{tar}: its index is stale, the tar has changed since; {remedy}")


def _header_hash(rows: Any, read_at: Callable[[int, int], bytes]) -> str:
    """Over the header blocks right before the data of a few evenly spaced utterances."""
    digest = hashlib.sha256()
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, min(rows.num_rows, _HASHED_ROWS)).round())
    for row in chosen.astype(int).tolist():
        for column in ("audio_offset", "meta_offset"):
            offset = rows.column(column)[row].as_py()
            digest.update(read_at(offset - _HEADER, _HEADER))
    return digest.hexdigest()


class Corpus:
    """The indexes of many shards as one sequence of U utterances, numbered in the shards' order.

    shards: tar paths or urls, sorted. shard_sizes: int64 [number of shards], utterances in each.
    durations: float64 [U], seconds. text_lengths: int32 [U], characters. fingerprint: sha256 of
    what the order and the content of the data follow from: shard names (without directories), tar
    sizes and header hashes, and every utterance's place, duration and text length, so that a corpus
    that was merely moved keeps it.

    Holds no Python object per utterance, opens at most 1,024 indexes at a time, and pickles to a
    few bytes per shard: the indexes are opened again.
    """

    def __init__(
        self, shards: Sequence[str], arrays: Mapping[str, np.ndarray], cache: BlockCache | None
    ) -> None:
        self.shards = list(shards)
        self.shard_sizes = arrays["shard_sizes"]
        self.durations = arrays["durations"]
        self.text_lengths = arrays["text_lengths"]
        self.fingerprint = arrays["fingerprint"].tobytes().hex()
        self.cache = cache
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shard_sizes)])
        self._opened: OrderedDict[int, ShardIndex] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.shards, self.cache)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, i: int) -> str:
        """The key of utterance i. Keys are unique within a shard."""
        shard = self.shard_of(i)
        return self._rows(shard).column(0)[i - int(self._starts[shard])].as_py()

    def location(self, i: int) -> Location:
        """Raises DataError where an index that is opened again is not what it was."""
        shard = self.shard_of(i)
        row, rows = i - int(self._starts[shard]), self._rows(shard)
        # Location's fields after the shard are the first columns of SCHEMA.
        columns = range(len(Location._fields) - 1)
        return Location(self.shards[shard], *(rows.column(j)[row].as_py() for j in columns))

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds utterance i."""
        if not 0 <= i < len(self):
            raise IndexError(f"utterance {i} of {len(self)}")
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def column(self, name: str) -> pa.ChunkedArray:
        """One index column over all utterances, e.g. `sample_rate` or `audio_ext`."""
        chunks = [self._rows(shard).column(name) for shard in range(len(self.shards))]
        return pa.chunked_array(chunks, SCHEMA.field(name).type)

    def _rows(self, shard: int) -> Any:
        if shard not in self._opened:
            index = open_index(self.shards[shard], self.cache, verify_headers=False)
            if index.rows.num_rows != self.shard_sizes[shard]:
                raise DataError(f"{index.tar}: was made anew while in use; start again")
            self._opened[shard] = index
            if len(self._opened) > _OPEN_INDEXES:
                self._opened.popitem(last=False)
        return self._opened[shard].rows


def open_corpus(patterns: Sequence[str], cache: BlockCache | None = None) -> Corpus:
    """All shards that the patterns name: directories, globs, `{000..123}` ranges, tar files, urls.

    The shards are sorted by path, whatever the order of the patterns. `cache` is where blocks of
    remote indexes and shards are kept. Raises DataError when a pattern names no shard, or a shard
    has no index or one that does not fit it.
    """
    tars: set[str] = set()
    for pattern in patterns:
        found = list_tars(pattern)
        if not found:
            raise DataError(
                f"{pattern}: no *.tar shards there; give a directory that holds them, a glob such "
                "as DIR/**/*.tar, or make them with: python tools/make_shards.py MANIFEST --out DIR"
            )
        tars.update(found)
    if not tars:
        raise DataError("no shards given: name a directory, a glob or a tar file")
    return _open(sorted(tars), cache)


def _open(tars: Sequence[str], cache: BlockCache | None) -> Corpus:
    """Every index is opened and checked once on a node, unless the corpus is small."""
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(tars))) as pool:
        stamps = list(pool.map(_stamps, tars))
    known = [stamp for stamp in stamps if stamp is not None]
    index_bytes = sum(index.size or 0 for _, index in known)
    if len(known) < len(tars) or index_bytes < SHARED_UTTERANCES * _INDEX_BYTES:
        return Corpus(tars, _summary(tars, cache), cache)
    facts = json.dumps([VERSION, _SUMMARY_VERSION, list(tars), known])
    key = hashlib.sha256(facts.encode()).hexdigest()
    return Corpus(tars, shared_arrays("corpus", key, lambda: _summary(tars, cache)), cache)


def _stamps(tar: str) -> tuple[Stat, Stat] | None:
    """Of the tar and its index. None where one is missing, which opening it explains."""
    try:
        return file_stamp(tar), file_stamp(index_path(tar))
    except (OSError, DataError):
        return None


def _summary(tars: Sequence[str], cache: BlockCache | None) -> dict[str, np.ndarray]:
    """The arrays of a corpus. Raises DataError for the first shard that cannot be used."""
    digest, sizes = hashlib.sha256(), []
    durations: list[np.ndarray] = [np.empty(0)]
    text_lengths: list[np.ndarray] = [np.empty(0, np.int32)]
    for index in _opened(tars, cache):
        name = index.tar.rsplit("/", 1)[-1]
        digest.update(f"{name}\0{index.tar_size}\0{index.header_hash}\0".encode())
        for column in ("audio_offset", "duration", "text_length"):
            # pyarrow's own to_numpy imports pandas where there is one, 0.8 s of CPU.
            digest.update(np.from_dlpack(index.rows.column(column)).tobytes())
        sizes.append(index.rows.num_rows)
        # Copies, so that no more than a few indexes are mapped at a time: a system allows 65,530.
        durations.append(np.from_dlpack(index.rows.column("duration")).copy())
        text_lengths.append(np.from_dlpack(index.rows.column("text_length")).copy())
    return {
        "shard_sizes": np.array(sizes, dtype=np.int64),
        "durations": np.concatenate(durations),
        "text_lengths": np.concatenate(text_lengths),
        "fingerprint": np.frombuffer(digest.digest(), dtype=np.uint8),
    }


def _opened(tars: Sequence[str], cache: BlockCache | None) -> Iterator[ShardIndex]:
    def attempt(tar: str) -> ShardIndex | DataError:
        try:
            return open_index(tar, cache)
        except DataError as error:
            return error

    errors: list[DataError] = []
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(tars))) as pool:
        for result in pool.map(attempt, tars):
            if isinstance(result, DataError):
                errors.append(result)
            elif not errors:
                yield result
    if errors:
        more = f" (and {len(errors) - 1} more shards like that)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}") from errors[0]

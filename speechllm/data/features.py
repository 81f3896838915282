"""Encoder outputs beside the shards, read in place of audio.

`x.tar` has `x.features-KEY-DTYPE.bin`, KEY naming what made them. It holds, little-endian,
1. the frames of each utterance, beginning at a multiple of 64 bytes: T x D numbers in bf16; or D
   scales in fp32 and T x D numbers in int8, of which each column is to be multiplied by its scale;
2. a table, an Arrow IPC file with one row for each of the shard's index (see SCHEMA), whose schema
   metadata say what the frames are of;
3. the size of that table in 8 bytes, and 8 bytes by which the format is known.
T follows from the number of samples. Everything is read by byte ranges, so that a file may be
memory-mapped or lie behind a url.

Shape legend: T frames, D their width.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Any, Literal

import numpy as np

import pyarrow as pa

from speechllm.data.cache import BlockCache, blocks_of
from speechllm.data.files import local_path, open_binary
from speechllm.data.index import Corpus, ShardIndex
from speechllm.data.members import parse_metadata
from speechllm.data.remote import fetch, stat
from speechllm.data.shards import write_fully, writing
from speechllm.data.store import SILENCE, Store
from speechllm.errors import DataError
from speechllm.types import EncodedAudio, Utterance

Dtype = Literal["bf16", "int8"]

VERSION = "1"
SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),  # of the utterance's frames
        ("samples", pa.int64()),  # at 16 kHz; 0 where there are no frames
        ("error", pa.string()),  # why not, else null
    ]
)
_MAGIC = b"SPFRAMES"
_TAIL = 16
_ALIGNMENT = 64
_OPEN_TABLES = 256


@dataclass(frozen=True)
class FeatureFile:
    """One opened file. about: what its writer said of it. rows: a record batch of SCHEMA."""

    path: str
    about: dict[str, Any]
    rows: Any

    @property
    def dtype(self) -> Dtype:
        return "int8" if self.about["dtype"] == "int8" else "bf16"

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // int(self.about["frame_samples"]))

    def place(self, row: int) -> tuple[int, int, int]:
        """(offset, bytes, samples) of an utterance. Raises DataError where it has no frames."""
        error = self.rows.column("error")[row].as_py()
        if error is not None:
            raise DataError(error)
        samples = self.rows.column("samples")[row].as_py()
        return self.rows.column("offset")[row].as_py(), self._bytes(samples), samples

    def decode(self, data: bytes, num_samples: int) -> EncodedAudio:
        shape = (self.num_frames(num_samples), self.about["width"])
        if self.dtype == "bf16":
            return EncodedAudio(num_samples, np.frombuffer(data, np.int16).reshape(shape))
        scales_D = np.frombuffer(data, np.float32, shape[1])
        values_TD = np.frombuffer(data, np.int8, offset=scales_D.nbytes).reshape(shape)
        return EncodedAudio(num_samples, values_TD, scales_D)

    def silence(self) -> EncodedAudio:
        samples = len(SILENCE.samples)
        return self.decode(bytes(self._bytes(samples)), samples)

    def _bytes(self, num_samples: int) -> int:
        return frame_bytes(self.dtype, self.about["width"], self.num_frames(num_samples))


def frame_bytes(dtype: Dtype, width: int, frames: int, utterances: int = 1) -> int:
    """Bytes of so many frames on disk, but for what aligns them."""
    return 2 * width * frames if dtype == "bf16" else width * (4 * utterances + frames)


def feature_path(tar: str, key: str, dtype: Dtype) -> str:
    """`x.tar` -> `x.features-KEY-DTYPE.bin`."""
    return f"{tar.removesuffix('.tar')}.features-{key}-{dtype}.bin"


def content_hash(index: ShardIndex) -> str:
    """sha256 (hex) of what an index says of its shard's audio: another one fits no features."""
    digest = hashlib.sha256(f"{index.tar_size}\0{index.header_hash}\0".encode())
    for column in ("audio_offset", "audio_size", "duration"):
        digest.update(np.from_dlpack(index.rows.column(column)).tobytes())
    return digest.hexdigest()


class FeatureWriter:
    """Writes one file, whole or not at all: as a context manager, and `finish` gives it its name.

    What a killed writer of the same file has left goes. Utterances may come in any order. Raises
    DataError where the file cannot be written.
    """

    def __init__(self, path: str, num_rows: int) -> None:
        self.path, self._aside = path, f"{path}.tmp-{os.getpid()}"
        self._offsets = [0] * num_rows
        self._samples = [0] * num_rows
        self._errors: list[str | None] = ["was left out"] * num_rows
        self._end = 0
        with writing(path):
            # Of writers that were killed: each may take as much as the file itself.
            for leftover in glob.glob(f"{glob.escape(path)}.tmp-*"):
                os.remove(leftover)
            self._file: FileIO = open(self._aside, "wb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if os.path.exists(self._aside):
            os.remove(self._aside)

    def add(self, row: int, encoded: EncodedAudio) -> None:
        """The frames of the utterance in that row of the index."""
        self._offsets[row], self._samples[row] = self._end, encoded.num_samples
        self._errors[row] = None
        scales = b"" if encoded.scales_D is None else encoded.scales_D.tobytes()
        pieces = [scales, encoded.values_TD.tobytes()]
        size = sum(map(len, pieces))
        self._write([*pieces, bytes(-size % _ALIGNMENT)])

    def leave_out(self, row: int, reason: str) -> None:
        """The utterance in that row has no frames."""
        self._errors[row] = reason

    def finish(self, about: dict[str, Any]) -> int:
        """Write the table, which says all that `about` says, and rename. Returns the bytes."""
        columns = [self._offsets, self._samples, self._errors]
        arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
        schema = SCHEMA.with_metadata({"version": VERSION, "about": json.dumps(about)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        table = sink.getvalue().to_pybytes()
        self._write([table, len(table).to_bytes(8, "little"), _MAGIC])
        with writing(self.path):
            os.fsync(self._file.fileno())
            os.replace(self._aside, self.path)
        return self._end

    def _write(self, pieces: list[bytes]) -> None:
        with writing(self.path):
            write_fully(self._file, pieces)
        self._end += sum(map(len, pieces))


def open_features(path: str, cache: BlockCache | None = None) -> FeatureFile:
    """Raises FileNotFoundError, or DataError for what is no file of this format."""
    try:
        size, read = _ranges(path, cache)
        tail = read(max(0, size - _TAIL), min(size, _TAIL))
        length = int.from_bytes(tail[:8], "little")
        if len(tail) < _TAIL or tail[8:] != _MAGIC or length > size - _TAIL:
            raise DataError(f"{path}: holds no features, or is damaged")
        with pa.ipc.open_file(pa.BufferReader(read(size - _TAIL - length, length))) as reader:
            schema, rows = reader.schema, reader.get_batch(0)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    if metadata.get("version") != VERSION or not schema.equals(SCHEMA):
        raise DataError(f"{path}: holds no features of version {VERSION}")
    return FeatureFile(path, json.loads(metadata["about"]), rows)


def _ranges(path: str, cache: BlockCache | None) -> tuple[int, Callable[[int, int], bytes]]:
    """The file's size, and a function that reads (offset, size)."""
    if local_path(path) is None:
        about = stat(path)
        if about.size is None:
            raise DataError(f"{path}: its server does not tell its size")
        if cache is not None:
            return about.size, lambda offset, size: cache.read(path, about, offset, size)
        return about.size, lambda offset, size: fetch(path, offset, size, about)

    def read(offset: int, size: int) -> bytes:
        with open_binary(path) as file:
            file.seek(offset)
            data: bytes = file.read(size)
            return data

    return os.stat(local_path(path) or path).st_size, read


class FeatureStore(Store):
    """As `Store`, but utterances come with the frames that the encoder made of them, without audio.

    Whether the files are there, and of these shards, is for whoever makes one to look at.
    """

    def __init__(self, corpus: Corpus, key: str, dtype: Dtype) -> None:
        super().__init__(corpus)
        self._key, self._dtype = key, dtype
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(corpus.shard_sizes)])
        self._tables: OrderedDict[int, FeatureFile] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.corpus, self._key, self._dtype)

    @property
    def silence(self) -> Utterance:
        """Raises DataError where no shard has features that can be read."""
        first = int(np.flatnonzero(self.corpus.shard_sizes)[0])
        return Utterance("", SILENCE.samples[:0], "", encoded=self._table(first).silence())

    def read(self, i: int) -> Utterance:
        """Utterance i, without samples. Raises as `Store.read`."""
        place, shard = self.corpus.location(i), self.corpus.shard_of(i)
        where = f"{place.key} in {place.shard}"
        metadata = self._read(place, place.meta_offset, place.meta_size)
        file = self._table(shard)
        try:
            text, fields = parse_metadata(metadata, place.meta_ext)
            offset, size, samples = file.place(i - int(self._starts[shard]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        data = self._read(place._replace(shard=file.path), offset, size)
        encoded = file.decode(data, samples)
        return Utterance(place.key, SILENCE.samples[:0], text, fields, encoded)

    def remote_blocks(self, i: int) -> Iterator[tuple[str, int]]:
        place, shard = self.corpus.location(i), self.corpus.shard_of(i)
        if self.corpus.cache is None or local_path(place.shard) is not None:
            return
        file = self._table(shard)
        yield from ((place.shard, n) for n in blocks_of(place.meta_offset, place.meta_size))
        try:
            offset, size, _ = file.place(i - int(self._starts[shard]))
        except DataError:  # has no frames, which `read` says
            return
        yield from ((file.path, n) for n in blocks_of(offset, size))

    def _table(self, shard: int) -> FeatureFile:
        if shard in self._tables:
            self._tables.move_to_end(shard)
            return self._tables[shard]
        path = feature_path(self.corpus.shards[shard], self._key, self._dtype)
        try:
            file = open_features(path, self.corpus.cache)
        except FileNotFoundError as error:
            raise DataError(f"{path}: was removed while in use") from error
        self._tables[shard] = file
        if len(self._tables) > _OPEN_TABLES:
            self._tables.popitem(last=False)
        return file

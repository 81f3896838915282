"""Utterance number -> decoded utterance."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from speechllm.data.audio import decode_audio
from speechllm.data.files import filesystem, local_path, read_range
from speechllm.data.index import Corpus, Location
from speechllm.data.members import parse_metadata
from speechllm.errors import AudioError, DataError
from speechllm.types import Utterance

_OPEN_FILES = 128
# Audio and metadata of a key usually stand side by side: one read, and one round trip, for both.
_GAP = 1 << 16


class Store:
    """Reads utterances of a corpus by number, from any process: it may be forked and pickled.

    Local shards are read by `pread` on at most 128 files kept open; others through fsspec.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._files: OrderedDict[str, int] = OrderedDict()
        self._remote: dict[str, tuple[Any, str]] = {}
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.corpus,)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files kept open. Reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, i: int) -> Utterance:
        """Utterance i.

        `text` is stripped and may be empty. Raises AudioError or DataError naming key and shard
        where bytes are missing, the audio cannot be used, or the metadata hold no text.
        """
        place = self.corpus.location(i)
        audio, metadata = self.read_raw(place)
        where = f"{place.key} in {place.shard}"
        try:
            text, fields = parse_metadata(metadata, place.meta_ext)
            return Utterance(place.key, decode_audio(audio, place.audio_ext), text, fields)
        except AudioError as error:
            raise AudioError(f"{where}: {error}") from error
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def read_raw(self, place: Location) -> tuple[bytes, bytes]:
        """The bytes of the audio and of the metadata. Raises DataError naming key and shard."""
        audio_end = place.audio_offset + place.audio_size
        meta_end = place.meta_offset + place.meta_size
        first = min(place.audio_offset, place.meta_offset)
        last = max(audio_end, meta_end)
        if last - first <= place.audio_size + place.meta_size + _GAP:
            both = self._read(place, first, last - first)
            audio = both[place.audio_offset - first : audio_end - first]
            return audio, both[place.meta_offset - first : meta_end - first]
        return (
            self._read(place, place.audio_offset, place.audio_size),
            self._read(place, place.meta_offset, place.meta_size),
        )

    def _read(self, place: Location, offset: int, size: int) -> bytes:
        try:
            path = local_path(place.shard)
            if path is not None:
                data = os.pread(self._file(path), size, offset)
            else:
                fs, inner = self._filesystem(place.shard)
                data = read_range(fs, inner, offset, size)
        except OSError as error:
            raise DataError(f"{place.key} in {place.shard}: cannot be read ({error})") from error
        if len(data) != size:
            raise DataError(
                f"{place.key} in {place.shard}: {len(data)} of {size} bytes at {offset}; "
                "the shard was truncated while in use, or its server serves no byte ranges"
            )
        return data

    def _file(self, path: str) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def _filesystem(self, url: str) -> tuple[Any, str]:
        """fsspec's connections and event loop do not survive a fork: each process has its own."""
        if self._process != os.getpid():
            self._remote, self._process = {}, os.getpid()
        if url not in self._remote:
            self._remote[url] = filesystem(url)
        return self._remote[url]

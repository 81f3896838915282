"""Utterance number -> decoded utterance."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from speechllm.data.audio import decode_audio
from speechllm.data.cache import blocks_of
from speechllm.data.files import local_path
from speechllm.data.index import Corpus, Location
from speechllm.data.members import parse_metadata
from speechllm.data.remote import Stat, fetch, stat
from speechllm.errors import AudioError, DataError
from speechllm.types import SAMPLE_RATE, Utterance

SILENCE = Utterance("", np.zeros(SAMPLE_RATE // 10, dtype=np.int16), "")

_OPEN_FILES = 128
# Audio and metadata of a key usually stand side by side: one read, and one round trip, for both.
_GAP = 1 << 16


class Store:
    """Reads utterances of a corpus by number, from any process: it may be forked and pickled.

    Local shards are read by `pread` on at most 128 files kept open; of remote ones byte ranges are
    fetched, through the corpus's cache where it has one.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._files: OrderedDict[str, int] = OrderedDict()
        self._stats: dict[str, Stat] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.corpus,)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self._files.values():  # at exit this module has no names any more
            close(descriptor)

    def close(self) -> None:
        """Close the files kept open. Reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    @property
    def silence(self) -> Utterance:
        """What stands for utterances of which none could be read."""
        return SILENCE

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
        parts = [self._read(place, offset, size) for offset, size in _ranges(place)]
        if len(parts) == 2:
            return parts[0], parts[1]
        first = min(place.audio_offset, place.meta_offset)
        audio, metadata = place.audio_offset - first, place.meta_offset - first
        both = parts[0]
        return (
            both[audio : audio + place.audio_size],
            both[metadata : metadata + place.meta_size],
        )

    def remote_blocks(self, i: int) -> Iterator[tuple[str, int]]:
        """Url and number of each block of the cache that reading utterance i needs."""
        place = self.corpus.location(i)
        if self.corpus.cache is not None and local_path(place.shard) is None:
            for offset, size in _ranges(place):
                yield from ((place.shard, number) for number in blocks_of(offset, size))

    def keep_block(self, url: str, number: int) -> None:
        """Have a block in the cache. Raises OSError or DataError."""
        about = self._stat(url)
        if self.corpus.cache is not None and about.size is not None:
            self.corpus.cache.keep(url, about, number)

    def _read(self, place: Location, offset: int, size: int) -> bytes:
        try:
            path = local_path(place.shard)
            if path is None:
                return self._read_remote(place.shard, offset, size)
            data = os.pread(self._file(path), size, offset)
        except (OSError, DataError) as error:
            raise DataError(f"{place.key} in {place.shard}: cannot be read ({error})") from error
        if len(data) != size:
            raise DataError(
                f"{place.key} in {place.shard}: {len(data)} of {size} bytes at {offset}; "
                "the shard was truncated while in use"
            )
        return data

    def _read_remote(self, url: str, offset: int, size: int) -> bytes:
        about, cache = self._stat(url), self.corpus.cache
        if cache is None or about.size is None:
            return fetch(url, offset, size, about)
        if offset + size > about.size:
            raise DataError(f"{url}: has {about.size} bytes, {size} at {offset} are wanted")
        return cache.read(url, about, offset, size)

    def _stat(self, url: str) -> Stat:
        """As it was when this process first looked: a file that changes later is refused."""
        if url not in self._stats:
            self._stats[url] = stat(url)
        return self._stats[url]

    def _file(self, path: str) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def _ranges(place: Location) -> list[tuple[int, int]]:
    """(offset, size) of what is read at once: audio and metadata, or, where reading takes a round
    trip, both with what is between."""
    audio = place.audio_offset, place.audio_size
    metadata = place.meta_offset, place.meta_size
    if local_path(place.shard) is not None:
        return [audio, metadata]
    first, last = min(audio, metadata), max(audio, metadata)
    both = sum(last) - first[0]
    return [(first[0], both)] if both <= audio[1] + metadata[1] + _GAP else [audio, metadata]

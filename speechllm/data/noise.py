"""Banks of noises or impulse responses: the audio members of tars, without texts or indexes."""

from __future__ import annotations

import posixpath
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speechllm.data.audio import AUDIO_EXTENSIONS, decode_audio
from speechllm.data.files import list_tars, local_path, open_binary
from speechllm.data.members import clean_name, extension
from speechllm.data.remote import Stat, fetch, stat
from speechllm.errors import AudioError, DataError

_CACHED_BYTES = 64 << 20  # of decoded audio, in each process


class Member(NamedTuple):
    tar: str
    name: str
    offset: int
    size: int


class AudioBank:
    """The audio of some tars, by a number in [0, 1).

    The order is that of the members' names, whatever that of the tars. Recently decoded ones are
    kept, up to 64 MB in each process.

    Args:
        patterns: directories, globs or tars.
        key: of the configuration, for messages.
        channel: that is taken; without it channels are averaged.

    Raises:
        DataError: there is no tar, no audio in them, or one cannot be read.
    """

    def __init__(self, patterns: Sequence[str], key: str, *, channel: int | None = None) -> None:
        tars: set[str] = set()
        for pattern in patterns:
            found = list_tars(pattern)
            if not found:
                raise DataError(f"{key}: {pattern}: no *.tar there; give a directory, glob or tar")
            tars.update(found)
        self.members = sorted(
            (member for tar in tars for member in _audio_members(tar, key)),
            key=lambda member: (member.name, member.tar),
        )
        if not self.members:
            kinds = ", ".join(sorted(AUDIO_EXTENSIONS))
            raise DataError(f"{key}: no audio in {', '.join(sorted(tars))}; known are {kinds}")
        self._channel = channel
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._stats: dict[str, Stat] = {}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, which: float) -> str:
        """The name of what `read` gives for the same number."""
        return self.members[int(which * len(self.members))].name

    def read(self, which: float) -> np.ndarray:
        """int16 [N]: audio number `which` (in [0, 1)) of the bank. Raises DataError."""
        number = int(which * len(self.members))
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        samples = self._decode(self.members[number])
        self._decoded[number] = samples
        self._bytes += samples.nbytes
        while self._bytes > _CACHED_BYTES and len(self._decoded) > 1:
            self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return samples

    def _decode(self, member: Member) -> np.ndarray:
        where = f"{member.name} in {member.tar}"
        try:
            data = self._bytes_of(member)
        except (OSError, DataError) as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        try:
            return decode_audio(data, extension(member.name), channel=self._channel)
        except AudioError as error:
            raise DataError(f"{where}: {error}") from error

    def _bytes_of(self, member: Member) -> bytes:
        path = local_path(member.tar)
        if path is None:
            if member.tar not in self._stats:
                self._stats[member.tar] = stat(member.tar)
            return fetch(member.tar, member.offset, member.size, self._stats[member.tar])
        with open(path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def _audio_members(tar: str, key: str) -> list[Member]:
    members = []
    try:
        with (
            open_binary(tar) as file,
            tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
            ) as archive,
        ):
            for entry in archive:
                name = clean_name(entry.name)
                hidden = posixpath.basename(name).startswith(".")
                if entry.isreg() and extension(name) in AUDIO_EXTENSIONS and not hidden:
                    members.append(Member(tar, name, entry.offset_data, entry.size))
    except OSError as error:
        raise DataError(f"{key}: {tar}: cannot be read ({error})") from error
    except tarfile.TarError as error:
        raise DataError(f"{key}: {tar}: compressed, truncated or not a tar ({error})") from error
    return members

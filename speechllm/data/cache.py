"""Blocks of remote files, kept on this node in a directory of bounded size.

Any number of processes share the directory, also of several runs. A block is there whole or not at
all; it is fetched by one process while others that want it wait; the blocks that nobody has read
for longest make room, and whoever reads one of them at that moment still reads it to its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechllm.data.remote import Stat, fetch
from speechllm.errors import ConfigError
from speechllm.log import logger

BLOCK = 1 << 20
_LOCKS = 256
_FULL_AGAIN = 0.9  # part of the limit that is left in use, so that not every block makes room
_FORGOTTEN_SECONDS = 3600  # a file that is still being written after that belongs to nobody


class BlockCache:
    """Reads byte ranges through `directory`, which takes at most `limit` bytes of blocks.

    Raises ConfigError where the directory cannot be made or written. Pickles to its arguments.
    """

    def __init__(self, directory: str, limit: int) -> None:
        self.directory, self.limit = Path(directory), limit
        self._blocks, self._locks = self.directory / "blocks", self.directory / "locks"
        try:
            self._blocks.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
            with self._lock("used"):  # fails in a directory that another user has made
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={directory}: cannot be made or written ({error}); name a "
                "directory of your own"
            ) from error

    def __reduce__(self) -> tuple[type[BlockCache], tuple[str, int]]:
        return BlockCache, (str(self.directory), self.limit)

    def read(self, url: str, stat: Stat, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises OSError or DataError, as `remote.fetch`."""
        parts = []
        for number in blocks_of(offset, size):
            first = max(0, offset - number * BLOCK)
            end = min(BLOCK, offset + size - number * BLOCK)
            data = self._stored(url, stat, number, first, end)
            if data is None:
                data = self._fetched(url, stat, number)[first:end]
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def keep(self, url: str, stat: Stat, number: int) -> None:
        """Fetch a block that is not there. Raises OSError or DataError, as `remote.fetch`."""
        if self._stored(url, stat, number, 0, 0) is None:
            self._fetched(url, stat, number)

    def _stored(self, url: str, stat: Stat, number: int, first: int, end: int) -> bytes | None:
        path = self._path(url, stat, number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Shorter only where the machine itself went down while it was written.
            if os.fstat(descriptor).st_size != _block_size(stat, number):
                return None
            os.utime(descriptor)
            return os.pread(descriptor, end - first, first)
        finally:
            os.close(descriptor)

    def _fetched(self, url: str, stat: Stat, number: int) -> bytes:
        path, size = self._path(url, stat, number), _block_size(stat, number)
        with self._lock(str(int(path.name[:8], 16) % _LOCKS)):
            stored = self._stored(url, stat, number, 0, size)
            if stored is not None:
                return stored
            data = fetch(url, number * BLOCK, size, stat)
            try:
                self._write(path, data)
            except OSError as error:
                logger.warning("data.cache_dir: a block cannot be kept: %s", error)
            return data

    def _path(self, url: str, stat: Stat, number: int) -> Path:
        name = hashlib.sha256(f"{url}\0{stat.size}\0{stat.version}\0{number}".encode()).hexdigest()
        return self._blocks / name[:2] / name[:40]

    def _write(self, path: Path, data: bytes) -> None:
        """Aside, at its full length from the start, so that whoever counts sees what it takes."""
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}")
        try:
            with aside.open("wb") as file:
                with self._lock("used") as descriptor:
                    used = self._used(descriptor)
                    if used + len(data) > self.limit:
                        used = self._remove_oldest(int(self.limit * _FULL_AGAIN) - len(data))
                    if used + len(data) > self.limit:
                        raise OSError("no room: blocks that are being written take it all")
                    os.truncate(file.fileno(), len(data))
                    os.pwrite(descriptor, b"%-20d" % (used + len(data)), 0)
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
            aside.rename(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def _used(self, descriptor: int) -> int:
        """Bytes used at most: what was counted stays counted until the next look."""
        text = os.pread(descriptor, 32, 0).strip()
        return int(text) if text.isdigit() else self.limit

    def _remove_oldest(self, target: int) -> int:
        """Remove blocks until no more than `target` bytes are left; the bytes that are left."""
        used, found = 0, []
        for directory in os.scandir(self._blocks):
            for file in os.scandir(directory):
                try:
                    about = file.stat()
                except FileNotFoundError:
                    continue  # an unfinished one that has become a block
                used += about.st_size
                unfinished = file.name.startswith(".")
                if not unfinished or about.st_mtime < time.time() - _FORGOTTEN_SECONDS:
                    found.append((about.st_mtime_ns, about.st_size, file.path))
        for _, size, path in sorted(found):
            if used <= target:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used

    @contextmanager
    def _lock(self, name: str) -> Iterator[int]:
        """Held until the end of the block or of the process, however that ends."""
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            # Closing alone would leave it to a worker that another thread forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def blocks_of(offset: int, size: int) -> range:
    """The numbers of the blocks that hold these bytes."""
    return range(offset // BLOCK, -(-(offset + size) // BLOCK) if size else offset // BLOCK)


def _block_size(stat: Stat, number: int) -> int:
    assert stat.size is not None, "without a size there are no blocks"
    return min(BLOCK, stat.size - number * BLOCK)

"""A folder that several hosts see: what a meeting and a lease need of it, and no more.

Network file systems cache. A listing and an open ask the server again (close-to-open consistency),
a bare stat may not, so ages are read from open files after a listing. A file appears whole or not
at all, under a temporary name first. No locks: not every server keeps them. The only clock is the
server's, read from the time stamp of a file just touched.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Protocol


class Folder(Protocol):
    """Names are plain file names; times are seconds of one clock, that of the server."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> str | None:
        """None where there is no such file."""

    def write(self, name: str, text: str) -> None:
        """Make or replace the whole file."""

    def publish(self, name: str, text: str) -> bool:
        """Make the file; True where it holds `text` now, False where another one was first."""

    def touch(self, name: str) -> float:
        """Give the file the time of now, and return that. Raises FileNotFoundError."""

    def time_of(self, name: str) -> float | None:
        """When the file was last written or touched; None where there is no such file."""

    def remove(self, name: str) -> None: ...


class SharedFolder:
    """A `Folder` in the file system. Any method may raise OSError when the server is in trouble."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if not name.startswith("."))

    def read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        self._aside(text).replace(self.path / name)

    def publish(self, name: str, text: str) -> bool:
        aside = self._aside(text)
        try:
            # A link fails where the name exists, also over NFS; a rename would replace it.
            os.link(aside, self.path / name)
        except FileExistsError:
            # An answer that got lost on the way makes a client ask twice: look whose it is.
            return self.read(name) == text
        finally:
            aside.unlink(missing_ok=True)
        return True

    def touch(self, name: str) -> float:
        descriptor = os.open(self.path / name, os.O_WRONLY)
        try:
            os.utime(descriptor)  # no time given: the server's
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def time_of(self, name: str) -> float | None:
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _aside(self, text: str) -> Path:
        aside = self.path / f".{uuid.uuid4().hex}"
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return aside

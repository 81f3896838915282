"""A shared folder in memory, and nodes as threads that run one folder access at a time.

A schedule decides who makes the next access, when a node dies in the middle of what it does, and
how the clock goes on: every interleaving that a real folder allows, and repeatable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Killed(BaseException):
    """Ends a node's thread wherever it is."""


class MemoryFolder:
    """A `Folder`. The server's clock differs from those of the nodes on purpose."""

    OFFSET = 1e6

    def __init__(self) -> None:
        self.clock = 0.0
        self.files: dict[str, tuple[str, float]] = {}

    @property
    def now(self) -> float:
        return self.clock + self.OFFSET

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> str | None:
        return self.files[name][0] if name in self.files else None

    def write(self, name: str, text: str) -> None:
        self.files[name] = (text, self.now)

    def publish(self, name: str, text: str) -> bool:
        return self.files.setdefault(name, (text, self.now))[0] == text

    def touch(self, name: str) -> float:
        if name not in self.files:
            raise FileNotFoundError(name)
        self.files[name] = (self.files[name][0], self.now)
        return self.now

    def time_of(self, name: str) -> float | None:
        return self.files[name][1] if name in self.files else None

    def remove(self, name: str) -> None:
        self.files.pop(name, None)


class Node:
    """A thread that stops before each access to the folder until it is let go on."""

    def __init__(self, folder: MemoryFolder, work: Callable[[Node], None]) -> None:
        self.inner = folder
        self.alive = True
        self.touched = folder.clock
        self.error: BaseException | None = None
        self._killed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def clock(self) -> float:
        return self.inner.clock

    def access(self) -> None:
        """Let it make one access to the folder (or sleep once)."""
        if self.alive:
            self._go.release()
            self._stopped.acquire()
            if self.error is not None:
                raise self.error

    def kill(self) -> None:
        self._killed = True
        self.access()

    def pause(self) -> None:
        """Called in the thread, before each access and in place of sleeping."""
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Killed

    def _run(self, work: Callable[[Node], None]) -> None:
        try:
            self.pause()
            work(self)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.alive = False
            self._stopped.release()

    # The folder as this node sees it.

    def names(self) -> list[str]:
        self.pause()
        return self.inner.names()

    def read(self, name: str) -> str | None:
        self.pause()
        return self.inner.read(name)

    def write(self, name: str, text: str) -> None:
        self.pause()
        self.inner.write(name, text)

    def publish(self, name: str, text: str) -> bool:
        self.pause()
        return self.inner.publish(name, text)

    def touch(self, name: str) -> float:
        asked = self.inner.clock  # all that a node can know of when it will be done
        self.pause()
        self.touched = asked
        return self.inner.touch(name)

    def time_of(self, name: str) -> float | None:
        self.pause()
        return self.inner.time_of(name)

    def remove(self, name: str) -> None:
        self.pause()
        self.inner.remove(name)

"""Who may write to a run directory: the newest lease, and only that one.

When a job is rescheduled, its new start may run before the old one has got its signal. So every
start takes a lease first. Leases are files 00000001, 00000002, ...; each is made once, by one
start (`Folder.publish`), and the highest number counts. A start may make the next number when the
last one is released or has shown no sign of life for long; then it strikes out all before it, so
that an old trainer that wakes up finds another first line than its token, and publishes nothing.

A lock of the file system would need no signs of life, but between hosts it outlives a machine that
is gone, and a process that hangs keeps it. The trainer takes one all the same, against runs that
are started by hand (`speechllm.run_lock`), and among jobs that lock follows the lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from speechllm.cluster.folder import Folder

RELEASED = "released"


class Lease:
    """One start's wish to write to a run directory, and its right once it has it.

    token: unlike that of any other start. holder: what people are told of the holder.
    stale_after: seconds without a sign of life after which another may take over.
    """

    def __init__(
        self,
        folder: Folder,
        token: str,
        holder: str,
        stale_after: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.token = token
        self.holder = holder
        self.stale_after = stale_after
        self.name: str | None = None  # the file, while we hold the lease
        self._clock = clock
        self._renewed = 0.0

    def take(self) -> str | None:
        """None once the lease is ours; else why not yet. Safe to call again and again."""
        if self.name is not None:
            if self.renew():
                return None
            self.name = None
        numbers = self._numbers()
        last = numbers[-1] if numbers else 0
        if last and (busy := self._busy(_name(last))):
            return busy
        name, asked = _name(last + 1), self._clock()
        if not self.folder.publish(name, f"{self.token}\n{self.holder}\n"):
            return "another start has just taken over the run directory"
        for number in numbers:
            if (self.folder.read(_name(number)) or RELEASED).split("\n")[0] != RELEASED:
                self.folder.write(_name(number), f"{RELEASED}\nlost to {self.holder}\n")
        self.name, self._renewed = name, asked
        return None

    def renew(self) -> bool:
        """A sign of life; False once the lease is lost, or may be because we were silent long."""
        assert self.name is not None
        asked = self._clock()
        if asked - self._renewed > self.stale_after * 2 / 3:
            return False
        if _name(self._numbers()[-1]) != self.name:
            return False
        if (self.folder.read(self.name) or "").split("\n")[0] != self.token:
            return False
        self.folder.touch(self.name)
        self._renewed = asked
        return True

    def release(self) -> None:
        """Give it back where we hold it. Call only when nothing of ours writes any more."""
        if self.name is not None:
            self.folder.write(self.name, f"{RELEASED}\nby {self.holder}\n")
            self.name = None

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self.folder.names() if name.isdecimal())

    def _busy(self, name: str) -> str | None:
        first, *rest = (self.folder.read(name) or RELEASED).split("\n")
        if first == RELEASED:
            return None
        clock = f"clock.{self.token}"
        self.folder.write(clock, "")
        now = self.folder.touch(clock)
        self.folder.remove(clock)
        age = now - (self.folder.time_of(name) or now)
        if age > self.stale_after:
            return None
        return f"the run directory is still held by {rest[0]}, seen {max(age, 0.0):.0f} s ago"


def _name(number: int) -> str:
    return f"{number:08d}"

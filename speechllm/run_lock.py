"""One run at a time in a run directory: rank 0 holds a lock on RUN/lock while it may write there.

The kernel gives the lock back at whatever end of the process, so none is left behind. It is a lock
of POSIX (fcntl): file servers take part in it (NFS), and forked loader processes do not inherit it.
Only `train` asks for it; whatever just reads the directory is never held up.

The lease of a cluster job (`speechllm.lease`) stands above it. Between hosts a lock says too
little: a server may keep that of a machine which has gone, and so does a process that hangs. The
lease knows by signs of life, but needs somebody to give them, which only a job has. So between two
starts of jobs, which both have a lease, the lock follows the lease; in all other cases (by hand
against by hand, or against a job) the lock decides.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from speechllm.errors import UserError
from speechllm.log import logger
from speechllm.world import World

NAME = "lock"
# Seconds. A run whose launcher was killed has 30 to save (`speechllm.launcher`).
PATIENCE = 60.0
POLL = 0.5


@dataclass(frozen=True)
class Holder:
    """leased: with a lease, of a cluster job."""

    host: str
    pid: int
    since: str
    leased: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


UNKNOWN = Holder("an unknown host", 0, "?", leased=False)


@contextmanager
def sole_run(
    directory: Path, world: World, *, leased: bool, patience: float | None = None
) -> Iterator[None]:
    """No other run writes to the directory within this block. A collective, as is its refusal.

    leased: rank 0 has a lease. patience: seconds to wait for another run's end, else PATIENCE.

    Raises UserError on all ranks where another run still holds the directory after that, or rank 0
    cannot write there.
    """
    lock = RunLock(directory, leased=leased) if world.is_main else None
    try:
        _wait_for(lock, directory, world, PATIENCE if patience is None else patience)
        yield
    finally:
        if lock is not None:
            lock.release()


class RunLock:
    """One process's wish to write to a run directory. While it holds the lock, nothing else in that
    process may open the file: closing any descriptor of it gives a POSIX lock back."""

    def __init__(self, directory: Path, *, leased: bool) -> None:
        self.path = directory / NAME
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.me = Holder(socket.gethostname(), os.getpid(), since, leased)
        self._descriptor: int | None = None

    def take(self) -> Holder | None:
        """None once the lock is ours, or locks do not work there; else who holds it. Raises
        OSError where the file cannot be written."""
        while True:
            descriptor = _open(self.path)
            if not _lock(descriptor):
                holder = _read(descriptor)
                os.close(descriptor)
                if not (holder.leased and self.me.leased):
                    return holder
                self._replace()
                return None
            if _is_at(descriptor, self.path):
                self._hold(descriptor)
                return None
            os.close(descriptor)  # replaced or removed since it was opened

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _replace(self) -> None:
        """Put a new file, with our lock, in the place of one whose holder has lost the lease."""
        aside = self.path.with_name(f".{NAME}.{self.me.pid}")
        descriptor = _open(aside)
        _lock(descriptor)
        self._hold(descriptor)
        aside.replace(self.path)

    def _hold(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self.me)).encode() + b"\n", 0)
        os.fsync(descriptor)  # other hosts would not see it before it is closed


def _wait_for(lock: RunLock | None, directory: Path, world: World, patience: float) -> None:
    end = time.monotonic() + patience
    said = False
    while True:
        mine = _ask(lock, directory, patience, end) if lock is not None else None
        holder, refusal = world.from_main(mine)
        if refusal is not None:
            raise UserError(refusal)
        if holder is None:
            return
        if not said:
            logger.info("%s is written by %s, which may be about to end; waiting up to %.0f s",
                        directory, holder, patience)  # fmt: skip
            said = True
        time.sleep(POLL)


def _ask(
    lock: RunLock, directory: Path, patience: float, end: float
) -> tuple[str | None, str | None]:
    """Who holds the directory if not we, and where that is final, the words of the refusal."""
    try:
        holder = lock.take()
    except OSError as error:
        return None, f"run_dir={directory}: cannot be written ({lock.path}: {error.strerror})"
    if holder is None:
        return None, None
    if time.monotonic() < end:
        return str(holder), None
    return str(holder), (
        f"run_dir={directory}: another run writes there: {holder}; it did not end within "
        f"{patience:.0f} s. Wait for it, or end it (`kill {holder.pid}` on {holder.host}: it saves "
        f"a checkpoint), or take another run_dir. Only if that machine is gone for good: remove "
        f"{lock.path}"
    )


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int) -> bool:
    """False where another process has the lock."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        return False
    except OSError as error:
        logger.warning(
            "the file system of the run directory has no locks (%s): see to it that no other run "
            "is started there while this one lasts",
            error.strerror,
        )
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder:
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):  # not written yet
        return UNKNOWN

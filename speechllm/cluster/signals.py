"""Signals of a batch system: this process outlives them, and hands them on to those that save.

Grid Engine sends USR1, USR2 or TERM to every process of a job. Launchers and processes that are
still importing must ignore them, or the default action ends what was to be saved; so they are
started with the signals ignored, and the trainer puts its handlers in place when it can save. Since
a signal that came before that is lost, it is given again once to each process that catches it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class StopWish:
    """A context manager. reason: why to stop, by a signal or by `ask`; None: go on."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.number = signal.SIGUSR1  # handed on
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopWish:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            # A trainer takes a second SIGINT for impatience.
            self.number = signal.SIGTERM if number == signal.SIGINT else signal.Signals(number)


class Forwarder:
    """Gives a signal once to each process, as soon as that has a handler for it."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def forward(self, number: signal.Signals, pids: Iterable[int]) -> None:
        for pid in pids:
            if pid not in self._told and catches(pid, number):
                with suppress(ProcessLookupError):  # it has ended since
                    os.kill(pid, number)
                self._told.add(pid)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for the signal. Reads Linux's /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def ignore_stop_signals() -> None:
    """Called between fork and exec, it holds for what is started until that installs handlers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it has ended, however it ends.

    Launchers start the processes of a rank in sessions of their own, where a batch system that
    kills by process group does not find them.
    """
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it."""
    for one in [pid, *descendants(pid)]:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Of a process, by /proc, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]

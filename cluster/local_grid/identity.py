"""Processes that are known to be ours: a process number alone may have been given to another."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def _start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def remember(pid: int, path: Path) -> None:
    record = {"pid": pid, "start_ticks": _start_ticks(pid), "boot": BOOT.read_text().strip()}
    path.write_text(json.dumps(record) + "\n")


def running(path: Path) -> int | None:
    """The process that `remember` wrote down, while the very same one runs."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    same_boot = record["boot"] == BOOT.read_text().strip()
    if same_boot and record["start_ticks"] == _start_ticks(record["pid"]) is not None:
        return int(record["pid"])
    return None


def end(path: Path, number: signal.Signals, patience: float) -> bool:
    """Send a signal to the remembered process; True where it is gone within `patience` seconds."""
    pid = running(path)
    if pid is None:
        return True
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if running(path) != pid:  # only what is behind the handle is signalled
            return True
        signal.pidfd_send_signal(handle, number)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(patience * 1000))
    finally:
        os.close(handle)

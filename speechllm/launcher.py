"""A rank does not outlive its launcher for long.

torchrun starts its ranks in sessions of their own, and a launcher that is killed by SIGKILL cannot
tell its ranks: they would train on, and nobody would look after them. So each rank watches the
process that started it. Once that is gone, the rank is treated as if the launcher had been ended by
SIGTERM: it gets SIGTERM, so that `train` saves with the other ranks and leaves with exit code 99
while all else ends at once, and SIGKILL after the 30 s that torchrun and deepspeed give, too.

A thread asks, where the kernel could signal by itself (PR_SET_PDEATHSIG, as `speechllm.cluster`
has it): one signal is not enough, since SIGKILL alone loses steps, and after SIGTERM alone a rank
waits for a peer that is gone, up to `collective_timeout`. The kernel's signal also comes when only
the thread that started the rank has ended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from speechllm.log import logger

POLL = 1.0  # seconds
GRACE = 30.0  # seconds to save
# What torchrun, and deepspeed's launcher, set for their ranks alone. Ranks that something else has
# started, such as a shell that may go, are left in peace.
MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


class LauncherWatch:
    """A context manager: within, this process ends when its launcher does; nothing without one."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._over = threading.Event()

    def __enter__(self) -> LauncherWatch:
        if chain := launchers(self._environment):
            threading.Thread(
                target=self._watch, args=(chain,), name="launcher", daemon=True
            ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self, chain: list[int]) -> None:
        while _is_alive(chain):
            if self._over.wait(POLL):
                return
        if self._environment.get("LOCAL_RANK", "0") == "0":  # once a host
            logger.warning(
                "the launcher (process %d) is gone; its ranks here have %.0f s to save and end",
                chain[-1],
                GRACE,
            )
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._over.wait(GRACE):
            os.kill(os.getpid(), signal.SIGKILL)


def launchers(environment: Mapping[str, str], proc: Path = Path("/proc")) -> list[int]:
    """The process that started this rank, and the one that a person started, where it is another:
    `deepspeed` starts its launcher. None where there is no launcher."""
    if not any(mark in environment for mark in MARKS):
        return []
    parent = os.getppid()
    above = parent_of(parent, proc)
    return [parent] if above is None or not _is_deepspeed(above, proc) else [parent, above]


def parent_of(pid: int, proc: Path = Path("/proc")) -> int | None:
    """None where that cannot be found out."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _is_deepspeed(pid: int, proc: Path) -> bool:
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(w == b"deepspeed.launcher.runner" or Path(os.fsdecode(w)).name == "deepspeed"
               for w in words[:3])  # fmt: skip


def _is_alive(chain: list[int]) -> bool:
    return os.getppid() == chain[0] and (len(chain) == 1 or parent_of(chain[0]) == chain[1])

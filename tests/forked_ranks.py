"""Ranks of the real command line as forks of the test's own process, which has imported it all.

A launcher is a fork too: its ranks share one log, and when one of them fails it ends the others as
torchrun and the deepspeed launcher do. Faults are planted in the child, so they end with it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import speechllm.train  # noqa: F401 - or each fork would import it
from speechllm.cli import main

Plant = Callable[[int], None]  # called with the rank, before the command
PATIENCE = 60.0


@dataclass
class Ended:
    """codes: by rank; minus the signal where one ended it. logs: by launcher."""

    codes: list[int]
    logs: list[str]


class Ranks:
    """`launchers`: the ranks of each. `ends_with`: what a launcher sends to the others of a rank
    that has failed; None lets them be."""

    def __init__(
        self,
        directory: Path,
        command: Sequence[str],
        *,
        launchers: Sequence[Sequence[int]] = ((0, 1),),
        plant: Plant | None = None,
        ends_with: signal.Signals | None = signal.SIGTERM,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.size = sum(map(len, launchers))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.launchers = []
        for number, ranks in enumerate(launchers):
            log = directory / f"launcher_{number}.log"
            if (pid := os.fork()) == 0:
                run = {
                    rank: _fork(log, lambda r=rank: _rank(r, self.size, port, command, plant))
                    for rank in ranks
                }
                for rank, process in run.items():
                    (directory / f"pid_{rank}").write_text(str(process))
                _launch(directory, run, ends_with)
                os._exit(0)
            self.launchers.append((pid, log))

    def process(self, rank: int) -> int:
        return int((self.directory / f"pid_{rank}").read_text())

    def said(self, rank: int) -> str | None:
        """What its launcher's log has, once the rank has ended."""
        if not (self.directory / f"code_{rank}").exists():
            return None
        return "".join(log.read_text() for _, log in self.launchers)

    def wait(self) -> Ended:
        """Raises AssertionError where they hang, after they have been killed."""
        deadline = time.monotonic() + PATIENCE
        hang = False
        for pid, _ in self.launchers:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
                if time.monotonic() > deadline and not hang:
                    hang = True
                    for rank in range(self.size):
                        os.kill(self.process(rank), signal.SIGKILL)
        logs = [log.read_text() for _, log in self.launchers]
        assert not hang, f"the ranks hang: {logs}"
        codes = [int((self.directory / f"code_{rank}").read_text()) for rank in range(self.size)]
        return Ended(codes, logs)


def _fork(log: Path, body: Callable[[], int]) -> int:
    if pid := os.fork():
        return pid
    gc.freeze()  # what it has of the test is no garbage, and takes 0.5 s to look through and copy
    code = 1
    try:
        sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        for number in (1, 2):
            os.dup2(sys.stderr.fileno(), number)
        code = body()
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _rank(rank: int, size: int, port: int, command: Sequence[str], plant: Plant | None) -> int:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if plant is not None:
        plant(rank)
    return main(command)


def _launch(directory: Path, run: dict[int, int], ends_with: signal.Signals | None) -> None:
    left = dict(run)
    while left:
        for rank, process in list(left.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            del left[rank]
            code = os.waitstatus_to_exitcode(status)
            (directory / f"code_{rank}").write_text(str(code))
            for other in left.values():
                if code and ends_with is not None:
                    os.kill(other, ends_with)
        time.sleep(0.02)

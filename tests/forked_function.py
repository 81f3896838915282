"""A function on several ranks at once, each a fork of the test's own process.

Forks have imported all that the test has, and see the values that it has computed before.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speechllm.world import World, connected

PATIENCE = 90.0  # seconds, for all ranks


def on_ranks(
    size: int,
    directory: Path,
    function: Callable[[World], Any],
    *,
    patience: float = PATIENCE,
) -> list[Any]:
    """What `function(world)` returns (JSON-able) by rank.

    Raises AssertionError with the traceback of each rank that failed, or that hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [directory / f"{size}_{port}_{rank}.json" for rank in range(size)]
    pids = [_fork(rank, size, port, answers[rank], function, patience) for rank in range(size)]
    _wait(pids, patience)
    results = [json.loads(a.read_text()) if a.is_file() else ["", "killed"] for a in answers]
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(results) if error]
    assert not failed, "\n".join(failed)
    return [value for value, _ in results]


def _fork(
    rank: int,
    size: int,
    port: int,
    answer: Path,
    function: Callable[[World], Any],
    patience: float,
) -> int:
    if pid := os.fork():
        return pid
    gc.freeze()  # what it has of the test is no garbage, and takes 0.5 s to look through and copy
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    result, code = ["", "left in silence"], 1
    try:
        with connected("cpu", timeout=patience / 3) as world:
            result, code = [function(world), ""], 0
    except BaseException:
        result = ["", traceback.format_exc()]
    finally:
        answer.write_text(json.dumps(result))
        os._exit(code)


def _wait(pids: list[int], patience: float) -> None:
    """Until all have ended; those that a failed rank leaves waiting, or that hang, are killed."""
    left, deadline = set(pids), time.monotonic() + patience
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.discard(pid)
                if status:
                    deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)

"""The same function over many items in several processes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from speechllm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_unordered(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[tuple[int, Result]]:
    """(number of the item, its result) as they get ready; in this process for one worker.

    The processes are forked by this call, not by the first `next`: call it before a progress bar
    starts its thread. The first exception of `function` ends all. Raises UserError when a worker
    is killed.
    """
    if num_workers <= 1 or len(items) <= 1:
        return ((number, function(item)) for number, item in enumerate(items))
    pool = ProcessPoolExecutor(min(num_workers, len(items)), initializer=_follow_parent)
    futures = {pool.submit(function, item): number for number, item in enumerate(items)}

    def results() -> Iterator[tuple[int, Result]]:
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again, with "
                "fewer --num-workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    return results()


def _follow_parent() -> None:
    """In a worker: Ctrl-C ends it quietly, and so does the death of the parent, kill -9 included.

    A forked worker holds the writing end of its own queue, so that it would wait for ever there.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

"""The same function over many items in several processes."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from speechllm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
# Items handed out beyond one for each process, so that none waits for this process.
_AHEAD = 2


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_unordered(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[tuple[int, Result]]:
    """(number of the item, its result) as they get ready; in this process for one worker.

    The processes are forked by this call, not by the first `next`: call it before a progress bar
    starts its thread. The first exception of `function` ends all, after what was begun has been
    finished and yielded. Raises UserError when a worker is killed, and stops the others.
    """
    if num_workers <= 1 or len(items) <= 1:
        return ((number, function(item)) for number, item in enumerate(items))
    num_workers = min(num_workers, len(items))
    pool = ProcessPoolExecutor(num_workers, initializer=_follow_parent)
    waiting = iter(enumerate(items))
    begun: dict[Future[Result], int] = {}

    def begin(count: int) -> BrokenProcessPool | None:
        try:
            for number, item in itertools.islice(waiting, count):
                begun[pool.submit(function, item)] = number
        except BrokenProcessPool as error:
            return error
        return None

    broken = begin(num_workers + _AHEAD)

    def results() -> Iterator[tuple[int, Result]]:
        failure: BaseException | None = broken
        try:
            while begun:
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    number = begun.pop(future)
                    error = future.exception()
                    if error is None:
                        yield number, future.result()
                    failure = failure or error
                    if failure is None:
                        failure = begin(1)
        finally:
            pool.shutdown(cancel_futures=True)
        if isinstance(failure, BrokenProcessPool):
            raise UserError(
                "a worker process was killed (out of memory?); what is finished is kept: run the "
                "same command again, with fewer --num-workers"
            ) from failure
        if failure is not None:
            raise failure

    return results()


def _follow_parent() -> None:
    """In a worker: Ctrl-C ends it quietly, and so does the death of the parent, kill -9 included.

    A forked worker holds the writing end of its own queue, so that it would wait for ever there.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

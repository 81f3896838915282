from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from speechllm.data.pool import map_unordered
from speechllm.errors import DataError, UserError


def _square(number: int) -> int:
    return number * number


def _refuse(number: int) -> int:
    if number == 2:
        raise DataError(f"number {number}")
    return number


def _die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_item_has_its_result(num_workers: int) -> None:
    results = dict(map_unordered(_square, range(20), num_workers))
    assert results == {i: i * i for i in range(20)}
    assert dict(map_unordered(_square, [], num_workers)) == {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_errors_come_through_as_they_are(num_workers: int) -> None:
    with pytest.raises(DataError, match="number 2"):
        list(map_unordered(_refuse, range(5), num_workers))


def _finish_late(number: int) -> int:
    if number == 0:
        raise DataError("at once")
    time.sleep(0.2)
    return number


def test_what_was_begun_is_finished_before_the_error() -> None:
    finished: list[int] = []
    results = map_unordered(_finish_late, range(50), 2)
    with pytest.raises(DataError, match="at once"):
        finished.extend(number for number, _ in results)
    assert 1 in finished
    assert len(finished) < 10


def test_a_killed_worker_is_a_users_error() -> None:
    with pytest.raises(UserError, match="fewer --num-workers"):
        list(map_unordered(_die, range(4), 2))


def _report_and_wait(queue: multiprocessing.SimpleQueue[int]) -> None:
    results = map_unordered(_pid_slowly, range(2), 2)
    queue.put(next(results)[1])
    next(results)


def _pid_slowly(number: int) -> int:
    time.sleep(60 * number)
    return os.getpid()


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_die_with_a_killed_parent() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    parent = context.Process(target=_report_and_wait, args=(queue,))
    parent.start()
    worker = queue.get()
    assert _is_running(worker)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(worker)

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

from speechllm.data.ahead import fetched_ahead
from speechllm.errors import DataError


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_tasks_come_in_order_and_their_pieces_are_fetched_before() -> None:
    fetched: list[int] = []
    four = threading.Event()

    def fetch(name: str, number: int) -> None:
        fetched.append(number)
        if len(fetched) >= 4:
            four.set()

    drawn = []

    def tasks() -> Iterator[int]:
        for n in range(100):
            drawn.append(n)
            yield n

    steps = fetched_ahead(tasks(), lambda n: [("a", n), ("a", n + 1)], fetch, limit=4, threads=2)
    assert next(steps) == 0
    assert drawn == [0, 1, 2, 3]  # five pieces, of which 0 and 1 are handed out
    assert four.wait(10)
    assert list(steps) == list(range(1, 100))


def test_a_piece_is_asked_for_once_while_it_is_ahead_and_errors_are_left_to_others() -> None:
    asked, done = [], threading.Event()

    def fetch(name: str, number: int) -> None:
        asked.append(number)
        if number == 9:
            done.set()
        raise DataError("no")

    tasks = [7, 7, 7, 9]
    steps = fetched_ahead(tasks, lambda n: [("a", n)], fetch, limit=10, threads=1)
    first = next(steps)
    assert done.wait(10)
    assert [first, *steps] == tasks
    assert asked == [7, 9]


def test_endless_tasks_of_few_pieces_come_at_once_and_are_not_drawn_for_ever() -> None:
    drawn = itertools.count()
    steps = fetched_ahead(drawn, lambda n: [("a", n % 3)], lambda *_: None, limit=10, threads=1)
    assert next(steps) == 0
    assert next(drawn) < 20
    taken = list(itertools.islice(steps, 2000))
    assert taken == sorted(taken)
    assert next(drawn) - taken[-1] < 1010
    steps.close()


def test_threads_end_with_the_iterator() -> None:
    # Another test's iterator may have ended a moment ago, and its threads not yet.
    before = set(threading.enumerate())
    steps = fetched_ahead(range(9), lambda n: [("a", n)], lambda *_: None, limit=1, threads=2)
    next(steps)
    threads = [t for t in threading.enumerate() if t.name == "fetch-ahead" and t not in before]
    assert len(threads) == 2
    steps.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()

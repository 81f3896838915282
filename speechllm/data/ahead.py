"""Fetching what will be needed, in the background, some way ahead of whoever needs it."""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from speechllm.errors import DataError
from speechllm.log import logger

T = TypeVar("T")
Piece = tuple[str, int]

# So many tasks are looked at for each one that is handed out, until enough are ahead: the first
# does not wait for all of them. And so many are ahead at most, where they want the same few pieces.
_AT_ONCE = 8
_MOST = 1000


def fetched_ahead(
    tasks: Iterable[T],
    pieces_of: Callable[[T], Iterable[Piece]],
    fetch: Callable[[str, int], None],
    *,
    limit: int,
    threads: int,
) -> Iterator[T]:
    """The tasks in their order; meanwhile the pieces of later ones are fetched.

    A task may arrive before its pieces are there. A piece that cannot be fetched is left to whoever
    needs it, who learns why. The threads end with the iterator.

    Args:
        limit: distinct pieces, of tasks that are not handed out yet.
    """
    wanted: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
    ended = threading.Event()

    def work() -> None:
        while (piece := wanted.get()) is not None and not ended.is_set():
            try:
                fetch(*piece)
            except (OSError, DataError) as error:
                logger.debug("not fetched ahead: %s", error)

    # Daemons: a run that is told to stop does not wait for a slow server.
    for _ in range(threads):
        threading.Thread(target=work, daemon=True, name="fetch-ahead").start()
    waiting: deque[tuple[T, set[Piece]]] = deque()
    ahead: Counter[Piece] = Counter()
    drawn = 0
    try:
        for task in tasks:
            pieces = set(pieces_of(task))
            for piece in sorted(pieces - ahead.keys()):
                wanted.put(piece)
            ahead.update(pieces)
            waiting.append((task, pieces))
            drawn += 1
            while waiting and (len(ahead) > limit or len(waiting) > _MOST or drawn == _AT_ONCE):
                drawn = 0
                yield _pop(waiting, ahead)
        while waiting:
            yield _pop(waiting, ahead)
    finally:
        ended.set()
        for _ in range(threads):
            wanted.put(None)


def _pop(waiting: deque[tuple[T, set[Piece]]], ahead: Counter[Piece]) -> T:
    task, pieces = waiting.popleft()
    ahead.subtract(pieces)
    for piece in pieces:
        if not ahead[piece]:
            del ahead[piece]
    return task

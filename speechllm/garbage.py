"""When Python looks for garbage that only its collector finds."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries_stay() -> Iterator[None]:
    """Around the first imports of a process: Python looks through libraries for garbage neither
    while they load, nor later, nor when the process ends.

    They are a million objects of which none is garbage, and to look through them takes 1 s of the
    7 s of CPU that the imports take, and 1 s again at the end. Where torch is there already, the
    process is someone else's, a test's or a notebook's, and is left as it is.
    """
    if "torch" in sys.modules:
        yield
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)
        if was_on:
            gc.enable()


class CollectedBySteps:
    """A context manager in which Python collects garbage when it is told to and at no other time.

    By itself it collects once enough objects have been made, so at another step on each rank, and
    all others wait for that one. What there is at the start, modules and libraries, is left out.
    """

    def __enter__(self) -> CollectedBySteps:
        self._was_on = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *exception: object) -> None:
        gc.unfreeze()
        if self._was_on:
            gc.enable()

    def collect(self, *, everything: bool) -> None:
        """What was made since the last time, or everything since the start."""
        gc.collect(2 if everything else 0)

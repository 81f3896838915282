"""When Python looks for garbage that only its collector finds."""

from __future__ import annotations

import gc


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

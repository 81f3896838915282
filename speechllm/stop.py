"""Signals as a wish to stop: the loop finishes its step, saves, and leaves with exit code 99."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from speechllm.types import STOP_SIGNALS


class StopSignals:
    """A context manager; `received` names the first signal that came while it was open.

    A second SIGINT ends the process at once, as a person who presses Ctrl-C twice expects.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name

"""Signals as a wish to stop: the loop finishes its step, saves, and leaves with exit code 99."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from speechllm.errors import ConfigError
from speechllm.types import STOP_SIGNALS


class StopSignals:
    """A context manager; `received` names the first signal that came while it was open.

    A second SIGINT ends the process at once, as a person who presses Ctrl-C twice expects.

    deadline: Unix seconds from which on it is as if a signal had come. Many batch systems kill
    without a warning when the time is up.
    """

    def __init__(self, *, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self._signal: str | None = None
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

    @property
    def received(self) -> str | None:
        """Why to stop; None: go on."""
        if self._signal is None and time.time() >= self.deadline:
            return "the time limit"
        return self._signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number).name


def deadline_of_environment() -> float:
    """SPEECHLLM_DEADLINE in Unix seconds, infinite without one. Raises ConfigError."""
    text = os.environ.get("SPEECHLLM_DEADLINE")
    if not text:
        return math.inf
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"SPEECHLLM_DEADLINE={text}: expected Unix seconds, as `date +%s` prints them"
        ) from None

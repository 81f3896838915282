from __future__ import annotations

import math
import os
import signal
import time

import pytest

from speechllm.errors import ConfigError
from speechllm.stop import StopSignals, deadline_of_environment
from speechllm.types import STOP_SIGNALS


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_becomes_a_wish(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name


def test_the_first_signal_is_the_one_that_is_named() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGUSR1"


def test_a_second_interrupt_ends_at_once() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_former_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopSignals():
        pass
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_the_time_limit_is_a_wish_to_stop() -> None:
    with StopSignals(deadline=time.time() + 3600) as stop:
        assert stop.received is None
        stop.deadline = time.time()
        assert stop.received == "the time limit"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == "SIGUSR2"


def test_the_deadline_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHLLM_DEADLINE", raising=False)
    assert deadline_of_environment() == math.inf
    monkeypatch.setenv("SPEECHLLM_DEADLINE", "1790000000.5")
    assert deadline_of_environment() == 1790000000.5
    monkeypatch.setenv("SPEECHLLM_DEADLINE", "tomorrow")
    with pytest.raises(ConfigError, match="Unix seconds"):
        deadline_of_environment()

from __future__ import annotations

import os
import signal

import pytest

from speechllm.stop import StopSignals
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

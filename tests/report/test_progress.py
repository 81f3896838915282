from __future__ import annotations

import logging

import pytest

from speechllm.report.progress import ProgressLine, clock, describe

METRICS = {
    "step": 20, "objective": "lm", "loss": 1.2345, "lr": 1e-3, "grad_norm": 0.5,
    "step_seconds": 2.0, "data_wait_seconds": 0.5, "utterances_per_second": 18.24,
    "audio_seconds_per_second": 40.2,
}  # fmt: skip


def test_the_line_says_what_matters() -> None:
    assert describe(METRICS) == (
        "lm loss 1.234 | lr 1.00e-03 | norm 0.50 | 18.2 utt/s | 40 audio h/h | data wait 25%"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_without_a_terminal_each_logged_step_is_one_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = ProgressLine(total=50, done=0, shown=True)
    with caplog.at_level(logging.INFO, logger="speechllm"):
        line.update(METRICS)
    line.close()
    assert "step 20/50" in caplog.text
    assert "ETA 1:00" in caplog.text
    silent = ProgressLine(total=50, done=0, shown=False)
    caplog.clear()
    silent.update(METRICS)
    assert caplog.text == ""

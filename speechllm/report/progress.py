"""The one line that says how training goes."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speechllm.log import logger


class ProgressLine:
    """A live bar on a terminal; elsewhere (job logs) one record for each logged step."""

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        self.total = total
        self.shown = shown
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=total, completed=done)
            self._bar.start()

    def update(self, metrics: dict[str, Any]) -> None:
        """`metrics` as in metrics.jsonl."""
        if not self.shown:
            return
        line = describe(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics["step"], description=line)
        left = (self.total - metrics["step"]) * metrics["step_seconds"]
        logger.info("step %d/%d | %s | ETA %s", metrics["step"], self.total, line, clock(left))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(metrics: dict[str, Any]) -> str:
    wait = metrics["data_wait_seconds"] / max(metrics["step_seconds"], 1e-9)
    return (
        f"{metrics['objective']} loss {metrics['loss']:.3f} | lr {metrics['lr']:.2e} | "
        f"norm {metrics['grad_norm']:.2f} | "
        f"{metrics['utterances_per_second']:.1f} utt/s | "
        f"{metrics['audio_seconds_per_second']:.0f} audio h/h | "
        f"data wait {wait:.0%}"
    )


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

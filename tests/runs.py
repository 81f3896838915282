"""Starting runs of the real command line from tests, and comparing what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from speechllm.checkpoint import find_checkpoint
from speechllm.config.load import load_config
from speechllm.config.schema import Config

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")
TIMINGS = {
    "step_seconds", "data_wait_seconds", "utterances_per_second", "audio_seconds_per_second",
}  # fmt: skip
PATIENCE = 120.0


def tiny_config(run_dir: Path, shards: Path, *overrides: str) -> Config:
    return load_config(TINY, [f"run_dir={run_dir}", f"data.train={shards}", *overrides])


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """`python -m speechllm COMMAND`."""
    return subprocess.Popen(
        [sys.executable, "-m", "speechllm", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, everything printed)."""
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def wait_for_steps(run_dir: Path, steps: int, has_ended: Callable[[], str | None]) -> None:
    """Until a run has logged so many. has_ended: what it printed, once it is over."""
    deadline = time.monotonic() + PATIENCE
    while len(metrics(run_dir)) < steps:
        assert (output := has_ended()) is None, output
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def stop_after(
    process: subprocess.Popen[str], run_dir: Path, steps: int, number: signal.Signals
) -> tuple[int, str]:
    """Send a signal once the run has logged `steps` steps."""

    def has_ended() -> str | None:
        return None if process.poll() is None else process.communicate()[0]

    wait_for_steps(run_dir, steps, has_ended)
    process.send_signal(number)
    return finish(process)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps, without what depends on the clock."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer and metrics are the same to the last bit."""
    assert metrics(one) == metrics(other)
    first, second = (find_checkpoint(run, prefer="last") for run in (one, other))
    assert first.name == second.name
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key in left:
            assert (left[key] == right[key]).all(), f"{name}: {key}"

"""RUN/status.json: where a run stands, for people and for the scripts that start it again."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from speechllm.lease import Lease
from speechllm.report.lines import to_json

State = Literal["running", "saved", "done", "failed"]


class RunStatus:
    """Only rank 0 has one. Written by rename, so a reader never sees half of it.

    Keys: state, step, steps, epoch, loss, utterances_per_second, eta_seconds, time (Unix seconds),
    host, pid, world_size, job and task (of Grid Engine), reason.
    """

    def __init__(self, run_dir: Path, *, steps: int, world_size: int, lease: Lease | None) -> None:
        self.path = run_dir / "status.json"
        self.lease = lease
        self._last: dict[str, Any] = {
            "steps": steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size,
            "job": os.environ.get("JOB_ID"),
            "task": os.environ.get("SGE_TASK_ID"),
        }

    def write(self, state: State, step: int, *, reason: str | None = None, **more: Any) -> None:
        """`more` (loss, ...) stays until it is given anew. Raises LostLease."""
        if self.lease is not None:
            self.lease.check()
        self._last |= {"state": state, "step": step, "time": time.time(), "reason": reason, **more}
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(to_json(self._last) + "\n", encoding="utf-8")
        aside.replace(self.path)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """None where there is none yet."""
    try:
        text = (run_dir / "status.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    status: dict[str, Any] = json.loads(text)
    return status

"""Processes that end on their own while the node runner looks at them."""

from __future__ import annotations

import json
import os
import signal
import subprocess

from speechllm.cluster import signals
from speechllm.cluster.processes import Processes


def ended_process() -> int:
    gone = subprocess.Popen(["true"])
    gone.wait()
    return gone.pid


def test_a_process_that_ends_before_its_signal_comes_is_no_error(monkeypatch):
    monkeypatch.setattr(signals, "catches", lambda pid, number: True)
    signals.Forwarder().forward(signal.SIGUSR1, [ended_process()])


def test_a_rank_that_ends_before_it_is_killed_is_no_error(tmp_path, monkeypatch):
    processes = Processes(
        ["true"], os.environ, directory=str(tmp_path), records=tmp_path, saves=False
    )
    record = json.dumps({"rank": 0, "pid": ended_process(), "code": None})
    (tmp_path / "rank_00000.json").write_text(record)
    monkeypatch.setattr(processes, "_is_ours", lambda pid: True)
    processes.kill()

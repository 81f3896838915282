from __future__ import annotations

from pathlib import Path

import pytest

from speechllm.errors import LostLease
from speechllm.lease import Lease
from speechllm.report.status import RunStatus, read_status


def test_what_was_said_once_stays_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_ID", "17")
    assert read_status(tmp_path) is None
    status = RunStatus(tmp_path, steps=10, world_size=2, lease=None)
    status.write("running", 4, loss=2.5, epoch=1)
    status.write("saved", 5, reason="SIGUSR2")
    found = read_status(tmp_path)
    assert found is not None
    assert (found["state"], found["step"], found["loss"]) == ("saved", 5, 2.5)
    assert (found["reason"], found["job"], found["world_size"]) == ("SIGUSR2", "17", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_run_that_lost_its_lease_says_nothing(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease", "old")
    lease.path.write_text("new")
    with pytest.raises(LostLease):
        RunStatus(tmp_path, steps=1, world_size=1, lease=lease).write("running", 0)
    assert read_status(tmp_path) is None

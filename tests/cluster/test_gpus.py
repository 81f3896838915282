"""Claims of GPUs: distinct, also at the same moment, and gone with their holder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechllm.cluster import gpus
from speechllm.cluster.gpus import Claimed, GpuError, GpusBusy, claim_gpus
from speechllm.cluster.sections import (
    CommandClaim,
    LocksClaim,
    NoClaim,
    SafeGpuClaim,
    SchedulerClaim,
)

HOLDER = """
import sys
from speechllm.cluster.gpus import claim_gpus
from speechllm.cluster.sections import LocksClaim
locks = LocksClaim(folder=sys.argv[1], devices=6)
with claim_gpus(locks, int(sys.argv[2]), patience=30) as claimed:
    print(" ".join(claimed.devices), flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def locks(folder: Path, devices: int = 6) -> LocksClaim:
    return LocksClaim(folder=str(folder), devices=devices)


def tool(path: Path, text: str) -> CommandClaim:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return CommandClaim(command=(str(path), "{count}"))


def test_six_at_once_get_six_devices_and_a_killed_one_gives_its_own_back(tmp_path):
    holders = [holder(tmp_path, 1) for _ in range(6)]
    devices = [one.stdout.readline().strip() for one in holders]
    assert sorted(devices) == ["0", "1", "2", "3", "4", "5"]
    with (
        pytest.raises(GpusBusy, match="1 GPUs wanted, 0 of 6 are free"),
        claim_gpus(locks(tmp_path), 1),
    ):
        pass
    holders[3].kill()
    holders[3].wait()
    with claim_gpus(locks(tmp_path), 1) as claimed:
        assert claimed.environment == {"CUDA_VISIBLE_DEVICES": devices[3]}
    for one in holders:
        one.communicate()


def test_all_or_none(tmp_path):
    with claim_gpus(locks(tmp_path, 3), 2) as first:
        assert first.devices == ("0", "1")
        with pytest.raises(GpusBusy), claim_gpus(locks(tmp_path, 3), 2):
            pass
        with claim_gpus(locks(tmp_path, 3), 1) as second:
            assert second.devices == ("2",)


def test_waiting_ends_when_the_other_leaves(tmp_path):
    other = holder(tmp_path, 6)
    other.stdout.readline()
    asked = []

    def release_then_go_on() -> bool:
        asked.append(1)
        other.communicate()
        return False

    with claim_gpus(locks(tmp_path), 6, patience=60, give_up=release_then_go_on) as claimed:
        assert claimed.devices == ("0", "1", "2", "3", "4", "5")
    assert asked == [1]


def test_waiting_ends_when_the_job_is_to_stop(tmp_path):
    began = time.monotonic()
    with (
        claim_gpus(locks(tmp_path, 1), 1),
        pytest.raises(GpusBusy),
        claim_gpus(locks(tmp_path, 1), 1, patience=3600, give_up=lambda: True),
    ):
        pass
    assert time.monotonic() - began < 600


def test_more_than_the_host_has_is_wrong_input(tmp_path):
    with (
        pytest.raises(GpuError, match="4 GPUs wanted, this host has 2") as caught,
        claim_gpus(locks(tmp_path, 2), 4, patience=3600),
    ):
        pass
    assert not isinstance(caught.value, GpusBusy)


def test_other_users_can_lock_the_same_files(tmp_path):
    former = os.umask(0o077)
    try:
        with claim_gpus(locks(tmp_path / "locks", 1), 1):
            assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o1777
            assert stat.S_IMODE((tmp_path / "locks" / "0.lock").stat().st_mode) == 0o666
    finally:
        os.umask(former)


def test_the_sites_tool_is_asked_with_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "COMMAND_LOCKS", str(tmp_path / "locks"))
    claim = tool(tmp_path / "free-gpus", 'echo "looking for $1"; echo 5,3')
    with claim_gpus(claim, 2) as claimed:
        assert claimed.environment == {"CUDA_VISIBLE_DEVICES": "5,3"}
        with pytest.raises(GpusBusy), claim_gpus(claim, 2):
            pass
    with claim_gpus(claim, 2):
        pass


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("exit 3", GpusBusy, "ended with 3"),
        ("echo none today, sorry!", GpusBusy, "names no GPU"),
        ("echo 1", GpusBusy, "2 GPUs wanted"),
        ("true", GpusBusy, "names no GPU"),
    ],
)
def test_a_tool_that_finds_none(tmp_path, text, error, words):
    claim = tool(tmp_path / "free-gpus", text)
    with pytest.raises(error, match=words), claim_gpus(claim, 2):
        pass


def test_a_tool_that_is_not_there(tmp_path):
    claim = CommandClaim(command=(str(tmp_path / "nothing"),))
    with pytest.raises(GpuError, match="cannot be run") as caught, claim_gpus(claim, 1):
        pass
    assert not isinstance(caught.value, GpusBusy)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("2,0", ("2", "0")),
        ("0 1", ("0", "1")),
        ("gpu1 gpu3", ("1", "3")),
        ("GPU-8f1c-aa,MIG-77", ("GPU-8f1c-aa", "MIG-77")),
    ],
)
def test_devices_that_the_scheduler_gave(text, devices):
    claim = SchedulerClaim(variable="SGE_HGR_gpu")
    with claim_gpus(claim, 2, environment={"SGE_HGR_gpu": text}) as claimed:
        assert claimed == Claimed(devices)


def test_a_scheduler_that_gave_none():
    with (
        pytest.raises(GpuError, match="CUDA_VISIBLE_DEVICES is not set"),
        claim_gpus(SchedulerClaim(), 1, environment={}),
    ):
        pass
    with (
        pytest.raises(GpuError, match="names 1 GPUs, the job wants 2"),
        claim_gpus(SchedulerClaim(), 2, environment={"CUDA_VISIBLE_DEVICES": "0"}),
    ):
        pass


def test_the_package_safe_gpu_claims_in_a_process_that_ends_with_the_claim(tmp_path, monkeypatch):
    """With a package of the same interface: the real one wants GPUs."""
    package = tmp_path / "safe_gpu"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "safe_gpu.py").write_text(
        "import os\n"
        "def claim_gpus(count):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    if count > 2: raise RuntimeError('only found these free: 0')\n"
        "    os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, range(count)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with claim_gpus(SafeGpuClaim(), 2) as claimed:
        assert claimed.devices == ("0", "1")
        pid = int((tmp_path / "pid").read_text())
        for warning in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):  # sent to all of a job
            os.kill(pid, warning)
        time.sleep(0.2)
        assert b"safe_gpu" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(GpusBusy, match="only found these free"), claim_gpus(SafeGpuClaim(), 3):
        pass


def test_nothing_is_claimed_where_nothing_is_wanted():
    for claim, count in ((NoClaim(), 2), (SchedulerClaim(), 0)):
        with claim_gpus(claim, count, environment={}) as claimed:
            assert claimed.environment == {}

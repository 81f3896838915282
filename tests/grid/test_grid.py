"""Jobs on a real Grid Engine of three hosts.

All in this one file, so that pytest-xdist gives them to one process and they share one cluster.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from grid_cluster import Grid, eventually

pytestmark = pytest.mark.grid


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


# The cluster itself: what the node runner builds upon.


def test_an_array_runs_on_several_hosts_and_holds_the_next_job(grid: Grid) -> None:
    folder = grid.folder("array")
    first = grid.qsub(folder, "hostname > host.$SGE_TASK_ID; sleep 2", "-t", "1-4")
    second = grid.qsub(folder, "cat host.* > all", "-hold_jid", first)
    grid.wait_until_gone(second)
    assert len(set(text(folder / "all").split())) >= 2
    assert len(text(folder / "all").split()) == 4


def test_going_up_twice_changes_nothing(grid: Grid) -> None:
    assert grid.script("up", "--hosts", 3) == "already up\n"
    refused = grid.attempt("up", "--hosts", 2)
    assert refused.returncode == 2
    assert "another size" in refused.stderr


def test_the_machine_itself_does_not_see_the_cluster(grid: Grid) -> None:
    """Its hosts do: they are called and addressed so, and know the job user."""
    seen = "cat /etc/passwd /etc/hosts /proc/mounts; hostname; ip -brief address"
    inside = grid.on("node2", "sh", "-c", seen)
    outside = subprocess.run(["sh", "-c", seen], capture_output=True, text=True, check=True).stdout
    for mark in ("griduser", "node2", "10.99.7.", "br0", str(grid.directory)):
        assert mark not in outside
        assert mark in inside or mark == "br0"


def test_exit_code_99_starts_the_job_again(grid: Grid) -> None:
    folder = grid.folder("again")
    job = grid.qsub(folder, "echo x >> starts; [ $(wc -l < starts) = 3 ] || exit 99", "-r", "n")
    grid.wait_until_gone(job)
    assert grid.exit_codes(job, 3) == [99, 99, 0]


SIGNALS = """
trap 'echo USR1 >> signals' USR1
trap 'echo USR2 >> signals; exit 0' USR2
echo ready >> signals
while true; do sleep 0.2; done
"""


def test_a_soft_limit_and_a_deletion_announce_themselves(grid: Grid) -> None:
    folder = grid.folder("signals")
    job = grid.qsub(folder, SIGNALS, "-notify", "-l", "s_rt=3")
    eventually(lambda: "USR1" in text(folder / "signals"), "the soft limit's signal")
    grid.on("head", "qdel", job)
    grid.wait_until_gone(job)
    assert text(folder / "signals").split() == ["ready", "USR1", "USR2"]


def test_a_dead_host_does_not_take_its_job_along(grid: Grid) -> None:
    folder = grid.folder("dead")
    lines = "hostname >> hosts; [ $(wc -l < hosts) = 2 ] || sleep 1000"
    job = grid.qsub(folder, lines, "-r", "y")
    grid.wait_for(job, "r")  # a job that the master has not yet heard of would stay lost
    grid.script("kill-host", grid.hosts_of(job)[0])
    try:
        grid.wait_until_gone(job)
    finally:
        grid.revive()
    first, second = text(folder / "hosts").split()
    assert first != second

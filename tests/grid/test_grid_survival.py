"""Runs on a real Grid Engine to which something happens: they lose nothing by it.

In a file of their own, so that pytest-xdist may give them to another process, which then has a
cluster of its own.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
from grid_cluster import Grid, eventually
from grid_runs import (
    STEPS,
    WHOLE_HOST,
    assert_same_curve,
    command,
    submit_training,
    text,
)
from runs import assert_same_run, metrics

from speechllm.checkpoint import find_checkpoint

pytestmark = pytest.mark.grid


def test_a_run_that_its_soft_limit_ends_goes_on_elsewhere(
    grid: Grid, grid_shards: Path, undisturbed: Path, seconds_of_a_run: float
) -> None:
    # Long enough for the second start: Grid Engine lets a job meet its limit only once.
    limit = round(max(30.0, 4 * seconds_of_a_run))
    job = submit_training(grid, grid_shards, "limited", "--with", f"requests.s_rt=0:0:{limit}")
    with job.held_after(5):
        last = job.starts()[-1]
        host = last["hosts"][0]
        grid.on_master("qmod", "-d", f"*@{host}")
        eventually(lambda: time.time() > last["time"] + limit + 2, "the limit")
    job.wait_until_gone()
    grid.on_master("qmod", "-e", f"*@{host}")
    assert job.starts()[-1]["hosts"] != [host], job.log()
    assert "SIGUSR1" in job.log()
    assert metrics(job.run_dir) == metrics(undisturbed), job.log()
    assert_same_run(job.run_dir, undisturbed)


def test_rescheduling_under_way_loses_nothing(
    grid: Grid, grid_shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, grid_shards, "rescheduled")
    with job.held_after(5):
        grid.on_master("qmod", "-rj", job.id)
        grid.wait_for(job.id, "Rr")
        lease_holders = text(job.run_dir / "status.json")
    job.wait_until_gone()
    assert json.loads(lease_holders)["state"] == "running"
    assert len(job.starts()) == 2, job.log()
    assert metrics(job.run_dir) == metrics(undisturbed), job.log()
    assert_same_run(job.run_dir, undisturbed)


BETTER = "touch runs; until [ -e leave ]; do sleep 0.2; done"


def test_a_better_queue_takes_the_host_and_the_run_goes_on_elsewhere(
    grid: Grid, grid_shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, grid_shards, "preempted", "--with", "checkpoint=migr")
    with job.held_after(5):
        [host] = grid.hosts_of(job.id)
        folder = grid.folder("better")
        better = grid.qsub(folder, BETTER, "-q", f"high.q@{host}")
        eventually(lambda: (folder / "runs").exists(), "the better job's start")
    job.wait_until_gone()
    (folder / "leave").touch()
    grid.wait_until_gone(better)
    first, second = (start["hosts"][0] for start in job.starts())
    assert first == host != second, job.log()
    assert metrics(job.run_dir) == metrics(undisturbed), job.log()
    assert_same_run(job.run_dir, undisturbed)


def test_a_host_dies_and_the_group_meets_again_on_the_third(
    grid: Grid, grid_shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, grid_shards, "bereaved", "--nodes", 2, *WHOLE_HOST)
    with job.held_after(12):
        victim = job.starts()[0]["hosts"][1]
        # Otherwise the master tries to start things there until it misses the host.
        grid.on_master("qmod", "-d", f"*@{victim}")
        grid.script("kill-host", victim)
    try:
        grid.wait_until_missed(victim, job.id)
        job.wait_until_gone()
    finally:
        grid.start()
        grid.on_master("qmod", "-e", f"*@{victim}")
    assert job.row()["state"] == "done", job.log()
    assert victim not in job.starts()[-1]["hosts"]
    assert len(set(job.starts()[-1]["hosts"])) == 2
    assert_same_curve(job.run_dir, undisturbed)


def test_a_chain_goes_on_where_a_link_breaks(
    grid: Grid, grid_shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, grid_shards, "chained", "--chain", 3)
    assert len(job.ids) == 3
    with job.held_after(12) as trainers:
        assert set(grid.states(job.ids[1]).values()) == {("hqw", "")}
        for pid in trainers:
            os.kill(pid, signal.SIGKILL)
    job.wait_until_gone()
    codes = [grid.exit_codes(number) for number in job.ids]
    assert codes[0] != [0], job.log()
    assert codes[1:] == [[0], [0]], job.log()
    assert metrics(job.run_dir) == metrics(undisturbed), job.log()
    assert_same_run(job.run_dir, undisturbed)


def test_cancelling_saves(grid: Grid, grid_shards: Path, undisturbed: Path) -> None:
    job = submit_training(grid, grid_shards, "cancelled")
    with job.held_after(5):
        asked = Thread(target=command, args=(grid, "cancel", job.run_dir))
        asked.start()
        eventually(lambda: any((job.run_dir / "cluster").glob("*/cancel")), "the wish")
    asked.join()
    job.wait_until_gone()
    assert job.row()["state"] == "cancelled", job.log()
    done = int(find_checkpoint(job.run_dir, prefer="last").name.rpartition("_")[2])
    assert 5 <= done < STEPS
    assert metrics(job.run_dir) == metrics(undisturbed)[:done]

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grid_cluster import Grid, cluster, why_not
from grid_runs import PYTHON, STEPS, overrides
from runs import TINY, metrics
from speech_files import write_shards

from speechllm.cli import main


@pytest.fixture(scope="session")
def grid() -> Iterator[Grid]:
    """One cluster for the session; tests that need it are skipped where it cannot be."""
    if reason := why_not():
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def grid_shards(grid: Grid) -> Path:
    return write_shards(grid.work / "shards", 48, num_shards=2)


@pytest.fixture(scope="session")
def undisturbed(grid: Grid, grid_shards: Path) -> Path:
    """The run that every other one must equal: in this process."""
    run_dir = grid.work / "undisturbed"
    assert main(["train", TINY, f"run_dir={run_dir}", *overrides(grid_shards)]) == 0
    grid.give(run_dir)
    assert len(metrics(run_dir)) == STEPS
    return run_dir


@pytest.fixture(scope="session")
def seconds_of_a_run(grid: Grid, grid_shards: Path) -> float:
    """How long such a run takes on a host of this machine, as busy as it is now."""
    settings = [f"run_dir={grid.work / 'timed'}", *overrides(grid_shards)]
    began = time.monotonic()
    grid.on("node1", *PYTHON, "-m", "speechllm", "train", TINY, *settings)
    return time.monotonic() - began

"""Training runs on the grid: submitted as a user does it, held at a step, compared afterwards."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from grid_cluster import ROOT, Grid, eventually
from runs import TINY, metrics

from speechllm.checkpoint import find_checkpoint

SUBMIT = ROOT / "cluster" / "submit.py"
STEPS = 30
PYTHON = ("env", "OMP_NUM_THREADS=1", sys.executable)
WHOLE_HOST = ("--gpus-per-node", "2", "--procs-per-node", "1")


def overrides(shards: Path) -> list[str]:
    return [
        f"data.train={shards}",
        "data.microbatch_tokens=512",
        f"train.steps={STEPS}",
        "train.checkpoint_every=10",
    ]


def submit(grid: Grid, *words: object) -> list[str]:
    """`python cluster/submit.py WORDS` on the master; the ids of the jobs, in order."""
    answer = command(grid, *words, "--site", "local_grid", "--json")
    return [number for one in json.loads(answer) for number in one["job_ids"]]


def command(grid: Grid, *words: object) -> str:
    return grid.on("head", sys.executable, SUBMIT, *words)


@dataclass(frozen=True)
class TrainingJob:
    """A submitted run of configs/tiny.yaml."""

    grid: Grid
    run_dir: Path
    ids: list[str]

    @property
    def id(self) -> str:
        return self.ids[-1]

    def wait_until_gone(self) -> None:
        self.grid.wait_until_gone(self.id)

    def row(self) -> dict[str, Any]:
        """What `status` says."""
        [row] = json.loads(command(self.grid, "status", self.run_dir, "--json"))
        return dict(row)

    def starts(self) -> list[dict[str, Any]]:
        [file] = (self.run_dir / "cluster").glob("*/attempts.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line for line in lines if line["event"] == "start"]

    def log(self) -> str:
        """Everything that the job printed."""
        return printed(self.run_dir)

    def trainers(self) -> list[int]:
        """The training processes on all hosts, as the machine numbers them."""
        mark = f"{self.run_dir}/cluster/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    # Launchers name the module further behind.
                    is_rank = "speechllm.cluster.rank" in words[:4]
                    if is_rank and mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except (FileNotFoundError, ProcessLookupError):
                    continue
        return found

    @contextmanager
    def held_after(self, steps: int) -> Iterator[list[int]]:
        """Let the run stand still once it has logged `steps` steps, so that what happens within
        happens in the middle of it, however fast or busy the machine is."""
        eventually(lambda: len(metrics(self.run_dir)) >= steps, self.log, pause=0.02)
        pids = self.trainers()
        assert pids, self.log()
        _send(pids, signal.SIGSTOP)
        try:
            assert len(metrics(self.run_dir)) < STEPS, "the run was over too soon"
            yield pids
        finally:
            _send(pids, signal.SIGCONT)


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def printed(run_dir: Path) -> str:
    """What the jobs of a run directory printed."""
    files = sorted((run_dir / "cluster").glob("*/logs/*"))
    return "\n".join(f"==> {file.name}\n{file.read_text()}" for file in files)


def submit_training(grid: Grid, shards: Path, name: str, *words: object) -> TrainingJob:
    run_dir = grid.work / name
    ids = submit(grid, "train", TINY, f"run_dir={run_dir}", *overrides(shards), *words)
    return TrainingJob(grid, run_dir, ids)


def assert_same_curve(run: Path, reference: Path, *, rel: float = 1e-5) -> None:
    """Each step once, with the loss and the gradient that the undisturbed run had."""
    one, other = metrics(run), metrics(reference)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for left, right in zip(one, other, strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(left[key] - right[key]) <= rel * abs(right[key]), (left, right)


def assert_close_weights(run: Path, reference: Path, *, atol: float = 2e-4) -> None:
    one, other = (
        load_file(find_checkpoint(r, prefer="last") / "trainable.safetensors")
        for r in (run, reference)
    )
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).abs().max() <= atol, key

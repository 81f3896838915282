"""Node runners as processes of this machine, on one shared folder, in place of a batch system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runs import PATIENCE, TINY

from speechllm.cluster.job import Job, write_job
from speechllm.cluster.profile import SiteProfile

ROOT = Path(__file__).parent.parent
MEETING = {"timeout": 60, "heartbeat": 0.5, "stale_after": 6}


def job_of(run_dir: Path, *arguments: str, **fields: Any) -> Job:
    """kind train by default. site: changes to a site without GPUs."""
    site = {"ports": [21000, 29999], "meeting": MEETING, **fields.pop("site", {})}
    job = Job(
        name="first",
        kind=fields.pop("kind", "train"),
        run_dir=str(run_dir),
        arguments=arguments,
        directory=str(ROOT),
        site=SiteProfile.model_validate(site),
        python=sys.executable,
        repository=str(ROOT),
        **fields,
    )
    write_job(job)
    return job


def training(run_dir: Path, shards: Path, *overrides: str, **fields: Any) -> Job:
    words = ("train", TINY, f"run_dir={run_dir}", f"data.train={shards}", *overrides)
    return job_of(run_dir, *words, **fields)


def start_node(job: Job, task: int = 1, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "speechllm.cluster.node", str(job.file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SGE_TASK_ID": str(task), "JOB_ID": "7",
             **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish_node(node: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = node.communicate(timeout=PATIENCE)
    return node.returncode, output


def step_of(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "status.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def wait_for_step(run_dir: Path, step: int, *nodes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while step_of(run_dir) < step:
        for node in nodes:
            assert node.poll() is None, node.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)

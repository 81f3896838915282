"""Node runners on this machine: what they end with, whatever happens to them."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from node_jobs import (
    finish_node,
    job_of,
    start_node,
    training,
    wait_for_step,
)
from runs import metrics

from speechllm.checkpoint import complete_checkpoints
from speechllm.cluster.attempts import Attempts
from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.group import AGAIN, PERSON, Result
from speechllm.cluster.job import Job
from speechllm.cluster.lease import Lease
from speechllm.cluster.node import Node
from speechllm.cluster.signals import StopWish, descendants

QUICK = {"timeout": 2, "heartbeat": 0.2, "stale_after": 1}


def run_node(job: Job, task: int = 1) -> tuple[int, str]:
    return finish_node(start_node(job, task))


def program(folder: Path, body: str) -> str:
    file = folder / "program.py"
    file.write_text(body)
    return str(file)


def status(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.distributed
def test_when_a_node_dies_the_other_leaves_and_goes_on_alone(tmp_path, shards):
    run_dir = tmp_path / "run"
    job = training(
        run_dir, shards, "train.steps=400", "train.checkpoint_every=2",
        mode="array", nodes=2, min_nodes=1,
        site={"meeting": {"timeout": 90, "heartbeat": 0.5, "stale_after": 6}},
    )  # fmt: skip
    first, second = start_node(job, 1), start_node(job, 2)
    wait_for_step(run_dir, 4, first, second)
    assert status(run_dir)["world_size"] == 2
    trained_by = descendants(second.pid)
    second.kill()
    second.wait()
    code, output = finish_node(first)
    assert code == AGAIN, output
    assert "task 2 on" in output
    assert not [pid for pid in trained_by if alive(pid)], "its processes died with it"
    done = len(metrics(run_dir))
    # The scheduler starts the first again; the second's host is gone.
    again = training(
        run_dir, shards, f"train.steps={done + 3}", "train.checkpoint_every=2",
        mode="array", nodes=2, min_nodes=1, site={"meeting": QUICK},
    )  # fmt: skip
    code, output = run_node(again)
    assert code == 0, output
    assert status(run_dir)["state"] == "done"
    assert status(run_dir)["world_size"] == 1
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, done + 4))
    records = Attempts(again).read()
    assert [(one.task, one.generation, one.code) for one in records] == [
        (1, 1, AGAIN), (1, 2, 0), (2, 1, None),
    ]  # fmt: skip


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.distributed
def test_a_signal_to_every_process_at_any_time_saves(tmp_path, shards):
    """As Grid Engine sends it; torchrun and processes that still import must outlive it."""
    run_dir = tmp_path / "run"
    job = training(run_dir, shards, "train.steps=400", procs_per_node=2)
    node = start_node(job)
    while not (run_dir / "train.log").exists():
        assert node.poll() is None, node.communicate()[0]
        time.sleep(0.05)
    for pid in [*descendants(node.pid), node.pid]:
        if alive(pid):
            os.kill(pid, signal.SIGUSR2)
    code, output = finish_node(node)
    assert code == AGAIN, output
    assert status(run_dir)["state"] == "saved"
    assert "exit code 99: saved at step" in output
    assert "Traceback" not in output
    (checkpoint,) = complete_checkpoints(run_dir)
    assert int(checkpoint.name.removeprefix("step_")) == status(run_dir)["step"]


def test_the_time_limit_and_a_wish_to_cancel(tmp_path, shards):
    """The limit before a program that takes no time to start, the wish before the trainer."""
    limited = job_of(
        tmp_path / "limited", program(tmp_path, "import time\ntime.sleep(600)\n"),
        kind="command", time_limit=1002.0, site={"time": {"margin": 1000}},
    )  # fmt: skip
    code, output = run_node(limited)
    assert code == AGAIN, output
    assert "stopped by the time limit" in output
    run_dir = tmp_path / "run"
    job = training(run_dir, shards, "train.steps=400")
    node = start_node(job)
    wait_for_step(run_dir, 2, node)
    job.cancel.touch()
    code, output = finish_node(node)
    assert code == 0, output
    assert "cancelled: saved at step" in output
    assert status(run_dir)["state"] == "saved"
    lines = [json.loads(line) for line in job.attempts.read_text().splitlines()]
    assert [line.get("code") for line in lines if line["event"] == "end"] == [0]


def test_wrong_input_is_for_a_person(tmp_path):
    code, output = run_node(job_of(tmp_path, "train", str(tmp_path / "missing.yaml")))
    assert code == PERSON
    assert "missing.yaml" in output
    assert "the input is wrong" in output


def test_a_job_file_that_is_not_there(tmp_path):
    job = job_of(tmp_path, "x")
    job.file.unlink()
    code, output = run_node(job)
    assert code == PERSON
    assert "submit the job again" in output


def test_attempts_are_bounded_and_begin_anew_once_a_person_was_asked(tmp_path):
    again = program(tmp_path, "import sys\nsys.exit(99)\n")
    job = job_of(tmp_path, again, kind="command", max_attempts=2)
    ends = [run_node(job) for _ in range(3)]
    assert [code for code, _ in ends] == [AGAIN, PERSON, AGAIN]
    assert "2 attempts in a row without progress" in ends[1][1]


def test_nobody_comes(tmp_path):
    job = job_of(
        tmp_path, "train", "x",
        mode="array", nodes=2, min_nodes=2, max_attempts=2, site={"meeting": QUICK},
    )  # fmt: skip
    code, output = run_node(job, task=2)
    assert code == AGAIN, output
    assert "s to meet: 1 of 2 nodes are here (task 2 on" in output
    assert "missing: task 1" in output
    code, output = run_node(job, task=2)
    assert code == PERSON
    assert "2 attempts in a row without progress" in output
    assert "missing: task 1" in output


def test_a_new_start_waits_for_the_lease_of_the_old_one(tmp_path):
    job = job_of(tmp_path, "train", str(tmp_path / "missing.yaml"))
    old = Lease(SharedFolder(job.run / "cluster" / "lease"), "old", "job old on node9", 60)
    assert old.take() is None
    node = start_node(job)
    for line in node.stdout:
        if "waiting: the run directory is still held by job old on node9" in line:
            break
    assert node.poll() is None
    assert old.renew()
    old.release()
    code, output = finish_node(node)
    assert code == PERSON, output
    held = sorted((job.run / "cluster" / "lease").iterdir())[-1].read_text()
    assert held.startswith("released\nby job first (7), task 1 on")


def test_a_signal_while_waiting(tmp_path):
    job = job_of(tmp_path, "train", "x", mode="array", nodes=2, min_nodes=2)
    node = start_node(job)
    for line in node.stdout:
        if "waiting" in line:
            break
    node.send_signal(signal.SIGTERM)
    code, output = finish_node(node)
    assert code == AGAIN
    assert "stopped by SIGTERM while waiting" in output
    assert not [file for file in job.meeting.iterdir() if file.name.startswith("member")]


def test_plain_programs_end_as_they_end_and_need_no_lease(tmp_path):
    body = "import os, sys\nprint('task', os.environ['SGE_TASK_ID'])\nsys.exit(7)\n"
    code, output = run_node(job_of(tmp_path, program(tmp_path, body), kind="shard"), task=3)
    assert code == 7
    assert "task 3" in output
    assert "exit code 7" in output
    assert not (tmp_path / "cluster" / "lease").exists()


def test_a_folder_that_does_not_answer_for_a_while_ends_nothing(tmp_path, monkeypatch):
    job = job_of(tmp_path, program(tmp_path, "import time\ntime.sleep(2)\n"), kind="command")
    asked = []

    def exists(path: Path) -> bool:
        if path == job.cancel:
            asked.append(path)
            if len(asked) in (2, 3):  # the first is before the start
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return os.path.exists(path)

    monkeypatch.setattr(Path, "exists", exists)
    assert Node(job, 1, StopWish()).run() == Result(0, "done")
    assert len(asked) > 3


def test_an_end_that_cannot_be_written_down_is_still_that_end(tmp_path):
    """As on a full disk; Grid Engine would not start again what ends with 1."""
    records = str(job_of(tmp_path, "x", kind="command").own / "attempts")
    body = (
        f"import pathlib, shutil, sys\nshutil.rmtree({records!r})\n"
        f"pathlib.Path({records!r}).touch()\nsys.exit(99)\n"
    )
    code, output = run_node(job_of(tmp_path, program(tmp_path, body), kind="command"))
    assert code == AGAIN, output
    assert "the program asks to be run again" in output


def test_trouble_of_the_file_system_is_no_failure_of_the_program(tmp_path):
    job = job_of(tmp_path, "train", "x", mode="array", nodes=2, min_nodes=2)
    job.meeting.touch()  # no folder can be made there
    code, output = run_node(job)
    assert code == AGAIN, output
    assert str(job.meeting) in Attempts(job).read()[0].reason


def test_only_a_training_is_judged_by_the_status_of_the_run(tmp_path):
    """A training may end in the run directory while its checkpoints are decoded."""
    done = json.dumps({"state": "done", "step": 9, "time": 2.0, "reason": None})
    body = (
        f"import os, pathlib, signal\npathlib.Path({str(tmp_path / 'status.json')!r})"
        f".write_text({done!r})\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    code, output = run_node(job_of(tmp_path, program(tmp_path, body), kind="command"))
    assert code == 137, output


def test_gpus_that_others_hold(tmp_path):
    claim = {"kind": "locks", "folder": str(tmp_path / "locks"), "devices": 2}
    job = job_of(
        tmp_path, program(tmp_path, ""), kind="command", gpus_per_node=3, site={"gpu_claim": claim}
    )
    code, output = run_node(job)
    assert code == PERSON
    assert "3 GPUs wanted, this host has 2" in output


def test_one_wrong_node_asks_for_a_person_on_all(tmp_path):
    """Under torchrun, whose own exit code says nothing."""
    body = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(2)\ntime.sleep(600)\n"
    job = job_of(
        tmp_path, program(tmp_path, body), kind="probe", mode="array", nodes=2, min_nodes=2
    )
    nodes = [start_node(job, task) for task in (1, 2)]
    ends = [finish_node(node) for node in nodes]
    assert [code for code, _ in ends] == [PERSON, PERSON], ends
    assert "the input is wrong" in ends[0][1]

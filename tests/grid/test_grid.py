"""Jobs on a real Grid Engine of three hosts.

All in this one file, so that pytest-xdist gives them to one process and they share one cluster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from grid_cluster import ROOT, Grid, eventually
from grid_runs import (
    STEPS,
    WHOLE_HOST,
    assert_close_weights,
    assert_same_curve,
    command,
    overrides,
    printed,
    submit,
    submit_training,
)
from runs import TINY, assert_same_run, metrics
from speech_files import write_corpus, write_shards

from speechllm.checkpoint import find_checkpoint
from speechllm.cluster.job import Job, Variant
from speechllm.cluster.profile import load_profile
from speechllm.cluster.submission import write_folder

pytestmark = pytest.mark.grid
PYTHON = ("env", "OMP_NUM_THREADS=1", sys.executable)


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module")
def shards(grid: Grid) -> Path:
    return write_shards(grid.work / "shards", 48, num_shards=2)


@pytest.fixture(scope="module")
def undisturbed(grid: Grid, shards: Path) -> Path:
    """The run that every other one must equal: one process, by hand."""
    run_dir = grid.work / "undisturbed"
    settings = [f"run_dir={run_dir}", *overrides(shards)]
    began = time.monotonic()
    grid.on("node1", *PYTHON, "-m", "speechllm", "train", TINY, *settings)
    (run_dir / "seconds").write_text(str(time.monotonic() - began))
    assert len(metrics(run_dir)) == STEPS
    return run_dir


@pytest.fixture(scope="module")
def seconds_of_a_run(undisturbed: Path) -> float:
    """How long such a run takes on this machine, as busy as it is now."""
    return float(text(undisturbed / "seconds"))


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
    assert list(dict.fromkeys(text(folder / "signals").split())) == ["ready", "USR1", "USR2"]


# Work that `speechllm-submit` sends.


def test_shards_of_an_array_are_those_of_one_process(grid: Grid) -> None:
    manifest = write_corpus(grid.work / "corpus", 40)
    make = [manifest, "--shard-size", "100KB"]
    grid.on("node1", *PYTHON, ROOT / "tools" / "make_shards.py", *make, "--out", "one")
    ids = submit(grid, "shard", *make, "--out", grid.work / "many", "--tasks", 4)
    grid.wait_until_gone(ids[-1])
    assert grid.exit_codes(ids[-1]) == [0]
    assert grid.exit_codes(ids[0], 4) == [0] * 4
    one, many = (
        {file.name: file.read_bytes() for file in (grid.work / out).iterdir() if file.is_file()}
        for out in ("one", "many")
    )
    shards = {name for name in one if name.endswith((".tar", ".arrow"))}
    assert len(shards) >= 8
    assert {name: many.get(name) for name in shards} == {name: one[name] for name in shards}
    assert {name for name in many if name.endswith((".tar", ".arrow"))} == shards


@pytest.mark.parametrize(
    "options",
    [
        ("--with", "multi_node=array"),
        ("--with", "multi_node=pe:nodes1"),
        ("--with", "multi_node=pe:nodes1", "--launcher", "deepspeed"),
    ],
    ids=["array", "pe", "pe-deepspeed"],
)
def test_two_hosts_train_like_one_process(
    grid: Grid, shards: Path, undisturbed: Path, options: tuple[str, ...], request
) -> None:
    job = submit_training(
        grid, shards, request.node.callspec.id, "--nodes", 2, *WHOLE_HOST, *options
    )
    job.wait_until_gone()
    assert job.row()["state"] == "done", job.log()
    assert_same_curve(job.run_dir, undisturbed)
    assert_close_weights(job.run_dir, undisturbed)
    [start] = job.starts()
    assert len(set(start["hosts"])) == 2
    assert json.loads(text(job.run_dir / "status.json"))["world_size"] == 2


def test_a_run_that_its_soft_limit_ends_goes_on_elsewhere(
    grid: Grid, shards: Path, undisturbed: Path, seconds_of_a_run: float
) -> None:
    # Long enough for the second start: Grid Engine lets a job meet its limit only once.
    limit = round(max(20.0, 2.5 * seconds_of_a_run))
    job = submit_training(grid, shards, "limited", "--with", f"requests.s_rt=0:0:{limit}")
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


def test_rescheduling_under_way_loses_nothing(grid: Grid, shards: Path, undisturbed: Path) -> None:
    job = submit_training(grid, shards, "rescheduled")
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
    grid: Grid, shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, shards, "preempted", "--with", "checkpoint=migr")
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
    grid: Grid, shards: Path, undisturbed: Path
) -> None:
    job = submit_training(grid, shards, "bereaved", "--nodes", 2, *WHOLE_HOST)
    with job.held_after(12):
        victim = job.starts()[0]["hosts"][1]
        # Otherwise the master tries to start things there until it misses the host.
        grid.on_master("qmod", "-d", f"*@{victim}")
        grid.script("kill-host", victim)
    try:
        job.wait_until_gone()
    finally:
        grid.start()
        grid.on_master("qmod", "-e", f"*@{victim}")
    assert job.row()["state"] == "done", job.log()
    assert victim not in job.starts()[-1]["hosts"]
    assert len(set(job.starts()[-1]["hosts"])) == 2
    assert_same_curve(job.run_dir, undisturbed)


def test_too_few_hosts_are_given_up_with_a_reason(grid: Grid, shards: Path) -> None:
    patience = ["--with", "meeting.timeout=3", "--with", "meeting.attempts=2"]
    job = submit_training(grid, shards, "lonely", "--nodes", 4, *WHOLE_HOST, *patience)
    eventually(lambda: any("E" in state for state, _ in grid.states(job.id).values()), job.log)
    row = job.row()
    assert row["state"] == "error"
    assert "of 4" in row["reason"] or "4 nodes" in row["reason"], row
    grid.on("head", "qdel", job.id)
    grid.wait_until_gone(job.id)
    assert not (job.run_dir / "metrics.jsonl").exists()


CLAIM = """\
import os, socket, time
name = f"{socket.gethostname()}.{os.environ['CUDA_VISIBLE_DEVICES']}"
open(name, "x").close()
while len([file for file in os.listdir() if "." in file]) < 6:
    time.sleep(0.1)
"""


def test_six_jobs_at_a_time_claim_six_gpus(grid: Grid) -> None:
    """Submitted by hand: `qsub` on the script that was rendered."""
    folder = grid.folder("claims")
    program = grid.work / "claim.py"
    program.write_text(CLAIM)
    claim = "gpu_claim={kind: locks, folder: /dev/shm/speechllm-gpus, devices: 2}"
    job = Job(
        name="claims",
        kind="command",
        run_dir=str(grid.folder("claims_run")),
        arguments=(str(program),),
        variants=(Variant(),) * 6,
        directory=str(folder),
        gpus_per_node=1,
        site=load_profile("local_grid", [claim]),
        python=sys.executable,
        repository=str(ROOT),
    )
    write_folder(job)
    grid.give(Path(job.run_dir))
    number = grid.on("head", "qsub", "-terse", job.script).partition(".")[0]
    grid.wait_until_gone(number)
    assert grid.exit_codes(number, 6) == [0] * 6, printed(Path(job.run_dir))
    assert sorted(file.name for file in folder.iterdir()) == [
        f"node{host}.{device}" for host in (1, 2, 3) for device in (0, 1)
    ]


def test_a_chain_goes_on_where_a_link_breaks(grid: Grid, shards: Path, undisturbed: Path) -> None:
    job = submit_training(grid, shards, "chained", "--chain", 3)
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


def test_cancelling_saves(grid: Grid, shards: Path, undisturbed: Path) -> None:
    job = submit_training(grid, shards, "cancelled")
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


def test_decoding_in_parts_scores_like_one_process(
    grid: Grid, shards: Path, undisturbed: Path
) -> None:
    alone = grid.work / "alone"
    grid.on("head", "cp", "-r", undisturbed, alone)
    split = f"test={shards}"
    one = ["-m", "speechllm", "generate", alone, "--split", split]
    grid.on("node1", *PYTHON, *one)
    ids = submit(grid, "generate", undisturbed, "--split", split, "--parts", 2)
    grid.wait_until_gone(ids[-1])
    assert grid.exit_codes(ids[-1]) == [0]
    parts, whole = (text(run / "predictions" / "test.jsonl") for run in (undisturbed, alone))
    assert len(whole.splitlines()) == 48
    assert parts == whole
    rates = json.loads(text(undisturbed / "predictions" / "wer.json"))["test"]
    single = json.loads(grid.on("node1", *PYTHON, "-m", "speechllm", "wer", "--json", alone))
    assert 0 < rates["wer"] == single[str(alone)]["test"]["wer"]

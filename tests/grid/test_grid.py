"""Jobs on a real Grid Engine of three hosts, to which nothing happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from grid_cluster import ROOT, Grid, eventually
from grid_runs import (
    PYTHON,
    WHOLE_HOST,
    assert_close_weights,
    assert_same_curve,
    printed,
    submit,
    submit_training,
    text,
)
from speech_files import write_corpus

from speechllm.cli import main
from speechllm.cluster.job import Job, Variant
from speechllm.cluster.profile import load_profile
from speechllm.cluster.submission import write_folder

pytestmark = pytest.mark.grid


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
    plan, array, check = submit(grid, "shard", *make, "--out", grid.work / "many", "--tasks", 4)
    grid.wait_until_gone(check)
    assert grid.exit_codes(plan) == grid.exit_codes(check) == [0]
    assert grid.exit_codes(array, 4) == [0] * 4
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
    grid: Grid, grid_shards: Path, undisturbed: Path, options: tuple[str, ...], request
) -> None:
    job = submit_training(
        grid, grid_shards, request.node.callspec.id, "--nodes", 2, *WHOLE_HOST, *options
    )
    job.wait_until_gone()
    assert job.row()["state"] == "done", job.log()
    assert_same_curve(job.run_dir, undisturbed)
    assert_close_weights(job.run_dir, undisturbed)
    [start] = job.starts()
    assert len(set(start["hosts"])) == 2
    assert json.loads(text(job.run_dir / "status.json"))["world_size"] == 2


def test_too_few_hosts_are_given_up_with_a_reason(grid: Grid, grid_shards: Path) -> None:
    patience = ["--with", "meeting.timeout=3", "--with", "meeting.attempts=2"]
    job = submit_training(grid, grid_shards, "lonely", "--nodes", 4, *WHOLE_HOST, *patience)
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


def test_decoding_in_parts_scores_like_one_process(
    grid: Grid, grid_shards: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = grid.work / "alone"
    shutil.copytree(undisturbed, alone, symlinks=True)
    split = f"test={grid_shards}"
    assert main(["generate", str(alone), "--split", split]) == 0
    ids = submit(grid, "generate", undisturbed, "--split", split, "--parts", 2)
    grid.wait_until_gone(ids[-1])
    assert grid.exit_codes(ids[-1]) == [0]
    parts, whole = (text(run / "predictions" / "test.jsonl") for run in (undisturbed, alone))
    assert len(whole.splitlines()) == 48
    assert parts == whole
    rates = json.loads(text(undisturbed / "predictions" / "wer.json"))["test"]
    capsys.readouterr()
    assert main(["wer", "--json", str(alone)]) == 0
    single = json.loads(capsys.readouterr().out)
    assert 0 < rates["wer"] == single[str(alone)]["test"]["wer"]

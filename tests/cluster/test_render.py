from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_grid import FakeGrid
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.cluster.job import Job, Variant, read_job, write_job
from speechllm.cluster.profile import load_profile, site_names
from speechllm.cluster.render import job_script, options_of, submit_arguments
from speechllm.cluster.requests import resource_requests
from speechllm.errors import ConfigError

VARIANTS = tuple(Variant(arguments=("--task", str(k))) for k in (1, 2, 3))


def make(site: str, *changes: str, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "name": "asr", "kind": "train", "run_dir": "/home/me/exp/asr", "directory": "/home/me",
        "arguments": ("train", "config.yaml"), "python": "/opt/python", "repository": "/opt/code",
        "site": load_profile(site, changes),
    }  # fmt: skip
    values |= {"time_limit": values["site"].time.limit} | fields
    return Job(**values)


LOG = "/home/me/exp/asr/cluster/asr/logs/$JOB_NAME.$JOB_ID"
SCRIPT = "/home/me/exp/asr/cluster/asr/script.sh"


def test_array_mode_as_at_but() -> None:
    job = make("but", nodes=2, gpus_per_node=4, mode="array")
    assert submit_arguments(job, ["17"]) == [
        "-terse", "-w", "e", "-C", "",
        "-N", "asr", "-S", "/bin/bash", "-wd", "/home/me", "-j", "y", "-o", f"{LOG}.$TASK_ID.log",
        "-q", "long.q@@gpu",
        "-l", "gpu=4,gpu_ram=20G,ram_free=64G,mem_free=64G,scratch=0.5",
        "-t", "1-2", "-notify", "-r", "y", "-hold_jid", "17", SCRIPT,
    ]  # fmt: skip


def test_parallel_environment() -> None:
    job = make("sge_pe", nodes=4, gpus_per_node=2, mode="pe")
    arguments = submit_arguments(job)
    assert arguments[arguments.index("-pe") :][:3] == ["-pe", "mpi", "32"]
    assert arguments[arguments.index("-o") + 1] == f"{LOG}.log"
    requests = arguments[arguments.index("-l") + 1]
    assert requests == "gpu=2,h_vmem=8192M,s_rt=23:55:00,h_rt=24:00:00"
    assert "-t" not in arguments
    one = submit_arguments(make("sge_pe"))
    assert one[one.index("-pe") :][:3] == ["-pe", "smp", "8"]


def test_one_slot_needs_no_environment() -> None:
    assert "-pe" not in submit_arguments(make("local_grid"))


def test_slurm() -> None:
    job = make("slurm", nodes=2, gpus_per_node=4, mode="array", name="a")
    assert submit_arguments(job, ["17", "18"]) == [
        "--parsable", "--job-name=a", "--chdir=/home/me",
        "--output=/home/me/exp/asr/cluster/a/logs/%x.%A.%a.log", "--open-mode=append",
        "--nodes=1", "--ntasks=1", "--cpus-per-task=8", "--partition=gpu", "--gres=gpu:4",
        "--mem=64G", "--time=24:00:00", "--signal=B:USR1@120", "--requeue", "--array=1-2",
        "--dependency=afterany:17:18", "/home/me/exp/asr/cluster/a/script.sh",
    ]  # fmt: skip


def test_memory_that_slurm_counts_for_each_cpu() -> None:
    changes = ("ram.names=mem-per-cpu", "ram.per=slot", "ram.amount=64G", "cpus.slots=8")
    assert "--mem-per-cpu=8192M" in submit_arguments(make("slurm", *changes))


@pytest.mark.parametrize("site", site_names())
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nodes": 3, "mode": "array", "gpus_per_node": 8},
        {"variants": VARIANTS, "kind": "shard"},
    ],
    ids=["single", "array", "variants"],
)
def test_directives_say_what_the_arguments_say(site: str, fields: dict[str, Any]) -> None:
    """`qsub script.sh` by hand is the same job."""
    job = make(site, **fields)
    lines = job_script(job).splitlines()
    directives = [line.split()[1:] for line in lines if line.startswith(("#$ ", "#SBATCH "))]
    assert directives == [list(option) for option in options_of(job)]
    arguments = submit_arguments(job)
    words = [word for directive in directives for word in directive]
    first = arguments.index(words[0])
    assert arguments[first : first + len(words)] == words
    assert arguments[-1] == str(job.script)
    first_command = next(i for i, line in enumerate(lines) if i and not line.startswith("#"))
    assert not any(line.startswith(("#$", "#SBATCH")) for line in lines[first_command:])
    assert subprocess.run(["bash", "-n"], input=job_script(job), text=True).returncode == 0


def test_the_bound_on_running_tasks_never_stops_a_group_from_meeting() -> None:
    group = submit_arguments(make("but", "array.max_running=2", nodes=4, mode="array"))
    assert "-tc" not in group
    alone = submit_arguments(make("but", "array.max_running=2", variants=VARIANTS))
    assert alone[alone.index("-tc") + 1] == "2"
    slurm = submit_arguments(make("slurm", "array.max_running=2", variants=VARIANTS))
    assert "--array=1-3%2" in slurm


@pytest.mark.parametrize(
    ("changes", "gpus", "requests"),
    [
        ([], 4, {"gpu": "4", "ram_free": "64G"}),
        (["cpus.pe=smp", "cpus.slots=2"], 4, {"gpu": "2", "ram_free": "32768M", "scratch": "0.25"}),
        (["cpus.pe=smp", "cpus.slots=2", "gpus.per=job"], 3, {"gpu": "3"}),
        (["cpus.pe=smp", "cpus.slots=3", "ram.per=job"], 3, {"ram_free": "64G"}),
        (["requests.arch=lx-amd64"], 1, {"arch": "lx-amd64"}),
        (["time.soft=s_rt", "time.limit=1:00:00"], 1, {"s_rt": "0:55:00"}),
    ],
)
def test_requests_of_a_host(changes: list[str], gpus: int, requests: dict[str, str]) -> None:
    found = resource_requests(make("but", *changes, gpus_per_node=gpus))
    assert {name: found[name] for name in requests} == requests


def test_no_gpus_ask_for_none() -> None:
    assert not {"gpu", "gpu_ram"} & set(resource_requests(make("but", gpus_per_node=0)))


def test_what_a_site_cannot_give_is_refused() -> None:
    with pytest.raises(ConfigError, match="divide by the slots"):
        submit_arguments(make("but", "cpus.pe=smp", "cpus.slots=2", gpus_per_node=3))
    with pytest.raises(ConfigError, match="3 tasks, but the site allows 2"):
        submit_arguments(make("but", "array.task_limit=2", variants=VARIANTS))


@pytest.mark.parametrize("character", [" ", ",", ":", "$", "'", '"', "\n", "ä"])
def test_paths_that_a_batch_system_reads_in_its_own_way(character: str) -> None:
    with pytest.raises(ConfigError, match="use only letters"):
        submit_arguments(make("but", run_dir=f"/home/a{character}b"))
    with pytest.raises(ConfigError, match="use only letters"):
        submit_arguments(make("slurm", directory=f"/home/a{character}b"))


@settings(max_examples=30, deadline=None)
@given(arguments=st.lists(st.text(max_size=20), max_size=4))
def test_arguments_of_the_job_never_reach_a_shell(arguments: list[str]) -> None:
    """Whatever the user passes stands in job.json and nowhere else, and reads back the same."""
    plain = make("but")
    job = plain.model_copy(update={"arguments": tuple(arguments)})
    assert job_script(job) == job_script(plain)
    assert submit_arguments(job) == submit_arguments(plain)
    assert Job.model_validate_json(job.model_dump_json()).arguments == job.arguments


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": 2}, "mode array or pe"),
        ({"mode": "array", "nodes": 2, "variants": VARIANTS}, "have no variants"),
        ({"min_nodes": 2}, "min_nodes 2 is above nodes 1"),
        ({"run_dir": "exp/a"}, "absolute"),
        ({"name": "1a"}, "name"),
        ({"name": "a b"}, "name"),
    ],
)
def test_jobs_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make("but", **fields)


def test_tasks_of_an_array_have_what_is_theirs(tmp_path: Path) -> None:
    variants = (Variant(arguments=("a",), run_dir="/exp/one"), Variant(arguments=("b",)))
    job = make("but", run_dir=str(tmp_path), variants=variants)
    write_job(job)
    job = read_job(job.file)
    one, two = job.for_task(1), job.for_task(2)
    assert one.after_python == ("-m", "speechllm", "train", "config.yaml", "a")
    assert (one.run, two.run) == (Path("/exp/one"), tmp_path)
    assert one.folder == two.folder == job.folder
    assert one.meeting != two.meeting
    assert one.cancel == two.cancel
    assert job.tasks == 2
    group = make("but", nodes=3, mode="array")
    assert (group.tasks, group.for_task(2)) == (3, group)


def test_a_broken_job_file_is_named(tmp_path: Path) -> None:
    for text in ("", "{", '{"name": "a"}'):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(ConfigError, match=r"job\.json"):
            read_job(tmp_path / "job.json")
    with pytest.raises(ConfigError, match="no such file"):
        read_job(tmp_path / "none.json")


def scripted(tmp_path: Path, site: str, *changes: str, program: str) -> list[str]:
    """A job script whose interpreter is a small program."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable} -SE\nimport os, signal, sys, time\n{program}\n")
    interpreter.chmod(0o755)
    job = make(site, *changes, run_dir=str(tmp_path), python=str(interpreter))
    (tmp_path / "script.sh").write_text(job_script(job))
    return ["bash", str(tmp_path / "script.sh")]


def test_the_script_sets_limits_and_environment_and_runs_the_node(tmp_path: Path) -> None:
    command = scripted(
        tmp_path, "but", "environment=['export GREETING=\"a b\"', 'cd /']", "ulimits={n: 512}",
        program="import json, resource\n"
        "print(json.dumps([sys.argv[1:], os.environ['GREETING'], os.getcwd(),"
        " resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.environ['PYTHONPATH']]))\n"
        "sys.exit(99)",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": "/else"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 99, done.stderr
    arguments, greeting, folder, files, path = json.loads(done.stdout)
    assert arguments == ["-m", "speechllm.cluster.node", f"{tmp_path}/cluster/asr/job.json"]
    assert (greeting, folder, files, path) == ("a b", "/", 512, "/opt/code:/else")


def test_a_warning_while_the_environment_is_made_ends_nothing(tmp_path: Path) -> None:
    kills = "environment=['kill -USR1 $$', 'kill -USR2 $$', 'kill -TERM $$']"
    done = subprocess.run(scripted(tmp_path, "but", kills, program="sys.exit(99)"))
    assert done.returncode == 99


@pytest.mark.parametrize("code", [0, 1, 99, 100])
def test_slurm_starts_again_what_ends_with_99(tmp_path: Path, code: int) -> None:
    command = scripted(
        tmp_path, "slurm",
        program="names = ('JOB_ID', 'SGE_TASK_ID', 'RESTARTED')\n"
        f"print(*(os.environ[n] for n in names))\nsys.exit({code})",
    )  # fmt: skip
    grid = FakeGrid(tmp_path / "grid")
    environment = {"PATH": grid.path, "SLURM_JOB_ID": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (code, "7 undefined 0\n"), done.stderr
    assert grid.calls("scontrol") == ([["requeue", "7"]] if code == 99 else [])


def test_slurms_signal_reaches_the_node(tmp_path: Path) -> None:
    """Slurm signals the script only; bash must hand it on and still tell the node's exit code."""
    command = scripted(
        tmp_path, "slurm",
        program="signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.3), os._exit(42)))\n"
        "print('ready', flush=True)\ntime.sleep(60)",
    )  # fmt: skip
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 42
    process.stdout.close()

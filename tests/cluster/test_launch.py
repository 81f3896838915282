"""What is started, with which environment, and what its end means."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from node_jobs import job_of

from speechllm.cluster.group import AGAIN, PERSON
from speechllm.cluster.launch import Place, hostfile_text, launch_command, launch_environment
from speechllm.cluster.network import HeldPort, NetworkError, own_address
from speechllm.cluster.processes import Processes
from speechllm.cluster.rank import RankRecord, rank_environment, read_records
from speechllm.cluster.signals import catches, descendants
from speechllm.cluster.slaves import NODE_TASK, Slaves, hosts_of
from speechllm.cluster.verdict import verdict
from speechllm.errors import UserError

SECOND = Place(node_rank=1, nodes=2, master="10.9.8.7", port=23456)


def of_option(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_torchrun_joins_at_the_master_that_was_agreed(tmp_path):
    job = job_of(tmp_path, "train", "x y.yaml", mode="array", nodes=2, procs_per_node=4)
    command = launch_command(job, SECOND, tmp_path / "hostfile")
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert of_option(command, "--nnodes") == "2"
    assert of_option(command, "--node-rank") == "1"
    assert of_option(command, "--nproc-per-node") == "4"
    assert of_option(command, "--master-addr") == "10.9.8.7"
    assert of_option(command, "--master-port") == "23456"
    assert of_option(command, "--max-restarts") == "0"
    assert command[-2:] == ["-m", "speechllm.cluster.rank"]


def test_deepspeed_goes_without_ssh(tmp_path):
    job = job_of(tmp_path, "train", "c.yaml", mode="array", nodes=2, launcher="deepspeed")
    command = launch_command(job, SECOND, tmp_path / "hostfile")
    assert "--no_ssh" in command
    assert of_option(command, "--hostfile") == str(tmp_path / "hostfile")
    assert of_option(command, "--node_rank") == "1"
    assert of_option(command, "--master_addr") == "10.9.8.7"
    assert of_option(command, "--master_port") == "23456"
    assert command[-2:] == ["--module", "speechllm.cluster.rank"]


def test_one_process_and_plain_programs_need_no_launcher(tmp_path):
    lone = Place(0, 1, "127.0.0.1", 1)
    plain = [sys.executable, "-m", "speechllm.cluster.rank"]
    assert launch_command(job_of(tmp_path, "train", "c.yaml"), lone, tmp_path) == plain
    shard = job_of(tmp_path, "tools/make_shards.py", kind="shard", procs_per_node=2)
    assert launch_command(shard, lone, tmp_path) == plain


def test_two_tasks_on_one_host_are_two_lines_of_a_hostfile():
    assert hostfile_text(["a", "b", "a"], 2) == "a slots=2\nb slots=2\na_2 slots=2\n"


def test_environment(tmp_path):
    job = job_of(
        tmp_path, "train", "it's $HOME.yaml",
        mode="array", nodes=2, procs_per_node=2, site={"network_interface": "ib0"},
    )  # fmt: skip
    environment = launch_environment(
        job, tmp_path, devices={"CUDA_VISIBLE_DEVICES": "4,5"}, deadline=1234.5,
        lease=(tmp_path / "lease", "token"), environment={"NSLOTS": "8", "PATH": "/bin"},
    )  # fmt: skip
    assert environment["PATH"] == "/bin"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert environment["OMP_NUM_THREADS"] == "4"
    assert float(environment["SPEECHLLM_DEADLINE"]) == 1234.5
    assert environment["SPEECHLLM_LEASE"] == str(tmp_path / "lease")
    assert environment["SPEECHLLM_LEASE_TOKEN"] == "token"
    words = json.loads(environment["SPEECHLLM_RANK_ARGUMENTS"])
    assert words == ["-m", "speechllm", "train", "it's $HOME.yaml"]
    bare = launch_environment(
        job_of(tmp_path, "x"), tmp_path, devices={}, environment={"OMP_NUM_THREADS": "3"}
    )
    assert bare["OMP_NUM_THREADS"] == "3"
    assert not {"SPEECHLLM_DEADLINE", "SPEECHLLM_LEASE", "GLOO_SOCKET_IFNAME"} & bare.keys()


def test_slots_of_a_parallel_environment_are_those_of_all_hosts(tmp_path):
    job = job_of(tmp_path, "x", mode="pe", nodes=4, site={"multi_node": "pe:mpi"})
    environment = launch_environment(job, tmp_path, devices={}, environment={"NSLOTS": "32"})
    assert environment["OMP_NUM_THREADS"] == "8"


# Addresses and ports


def test_address_of_an_interface():
    assert own_address("lo") == "127.0.0.1"
    with pytest.raises(NetworkError, match=r"network_interface: ib7 has no .*interfaces: .*lo"):
        own_address("ib7")
    assert socket.inet_aton(own_address(None))


def test_a_held_port_is_left_alone_by_others_and_open_to_the_launcher():
    first = HeldPort((31000, 31400))
    port = first.port
    with pytest.raises(NetworkError, match="none of"):
        HeldPort((port, port))
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set("key", "value")
    assert store.get("key") == b"value"
    del store
    first.close()


# Ranks and their exit codes


def start_rank(folder: Path, *words: str, saves: bool = False) -> Processes:
    return Processes(
        [sys.executable, "-m", "speechllm.cluster.rank"],
        {**os.environ, **rank_environment(words, folder), "RANK": "3"},
        directory=str(folder), records=folder, saves=saves,
    )  # fmt: skip


def ended(processes: Processes) -> int:
    return processes._launcher.wait(60)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("pass", 0, 0),
        ("sys.exit(2)", 2, 2),
        ("sys.exit(99)", 99, 0),
        ("sys.exit('no')", 1, 1),
        ("1 / 0", 1, 1),
        ("assert sys.argv[1:] == ['a b', '$x']", 0, 0),
    ],
)
def test_a_rank_leaves_its_code(tmp_path, body, code, told):
    (tmp_path / "program.py").write_text(f"import sys\n{body}\n")
    processes = start_rank(tmp_path, str(tmp_path / "program.py"), "a b", "$x")
    assert ended(processes) == told
    assert processes.codes() == [code]
    (record,) = read_records(tmp_path)
    assert record.rank == 3


def test_a_rank_sees_the_devices_that_were_claimed_whatever_the_launcher_says(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, sys\nsys.exit(os.environ['CUDA_VISIBLE_DEVICES'] != '4,5')\n"
    )
    job = job_of(tmp_path, str(tmp_path / "program.py"), kind="probe")
    environment = launch_environment(job, tmp_path, devices={"CUDA_VISIBLE_DEVICES": "4,5"})
    processes = Processes(
        [sys.executable, "-m", "speechllm.cluster.rank"],
        {**environment, "CUDA_VISIBLE_DEVICES": "0,1"},
        directory=str(tmp_path), records=tmp_path, saves=False,
    )  # fmt: skip
    ended(processes)
    assert processes.codes() == [0]


# The handler does not raise, as the trainer's does not, and it is still there at the end.
SAVING = """
import pathlib, signal, sys, time
stop = []
time.sleep(0.5)  # as if it was importing: a signal now must not kill it
signal.signal(signal.SIGUSR2, lambda *_: stop.append(True))
while not stop:
    time.sleep(0.01)
(pathlib.Path(__file__).parent / "saved").touch()
sys.exit(99)
"""


def test_a_signal_reaches_a_rank_whenever_it_comes(tmp_path):
    """Also while it imports, and while Python takes itself down after the save."""
    (tmp_path / "program.py").write_text(SAVING)
    processes = start_rank(tmp_path, str(tmp_path / "program.py"), saves=True)
    while processes.poll() is None:
        for pid in descendants(os.getpid()):
            if b"cluster.rank" in cmdline(pid):
                os.kill(pid, signal.SIGUSR2)
        processes.stop(signal.SIGUSR2)
    assert processes.poll() == 0
    assert processes.codes() == [99]
    assert (tmp_path / "saved").exists()


def cmdline(pid: int) -> bytes:
    """Of the program that it will be: before that a signal is for us."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_what_cannot_save_is_ended(tmp_path):
    (tmp_path / "program.py").write_text("import time\ntime.sleep(600)\n")
    processes = start_rank(tmp_path, str(tmp_path / "program.py"))
    while not read_records(tmp_path):
        assert processes.poll() is None
    processes.stop(signal.SIGUSR1)
    assert ended(processes) == -signal.SIGTERM
    assert processes.codes() == [None]


def test_kill_ends_the_whole_tree(tmp_path):
    (tmp_path / "program.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],\n"
        "                         start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r} + '.new').write_text(str(child.pid))\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r} + '.new').rename({str(tmp_path / 'pid')!r})\n"
        "time.sleep(600)\n"
    )
    processes = start_rank(tmp_path, str(tmp_path / "program.py"), saves=True)
    while not (tmp_path / "pid").exists():
        assert processes.poll() is None
    child = int((tmp_path / "pid").read_text())
    processes.kill()
    processes.kill()
    assert processes.poll() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while state_of(child) not in ("Z", None):  # a zombie where nobody asks for its end
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_program_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="/no/python cannot be started"):
        Processes(["/no/python"], {}, directory=str(tmp_path), records=tmp_path, saves=True)


def test_who_catches_a_signal():
    assert not catches(os.getpid(), signal.SIGUSR2)
    former = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert catches(os.getpid(), signal.SIGUSR2)
        assert not catches(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert not catches(2**22 + 1, signal.SIGUSR2)


SAVED = {"state": "saved", "step": 7, "time": 2, "reason": "SIGUSR1"}
RUNNING = {"state": "running", "step": 5, "time": 1}


@pytest.mark.parametrize(
    ("launcher", "ranks", "after", "stopped", "saves", "code", "words"),
    [
        (0, [0, 0], {"state": "done"}, None, True, 0, "done"),
        (0, [99, 99], SAVED, "SIGUSR1", True, AGAIN, "saved at step 7: SIGUSR1"),
        (1, [99, None], SAVED, None, True, AGAIN, "saved at step 7"),
        (1, [None, None], SAVED, "SIGTERM", True, AGAIN, "saved at step 7"),
        (1, [2, 2], {}, None, True, PERSON, "the input is wrong"),
        (2, [2], {"state": "failed", "reason": "bad"}, None, True, PERSON, "wrong: bad"),
        (1, [98, None], RUNNING, None, True, AGAIN, "lost the lease"),
        (1, [None, 1], {"state": "failed", "reason": "x"}, None, True, 1, "exit code 1: x"),
        (-9, [None], RUNNING, None, True, 137, "exit code 137"),
        (-9, [None], RUNNING, "the time limit", True, AGAIN, "before it could save"),
        (-15, [None], {}, "SIGUSR2", False, AGAIN, "before it was done"),
        (1, [0, 0], {"state": "done"}, None, True, 0, "done"),
        (1, [1], RUNNING, None, True, 1, "failed with exit code 1"),
        (3, [3], {}, None, False, 3, "exit code 3"),
        (100, [100], {}, None, False, PERSON, "a person"),
    ],
)
def test_verdict(launcher, ranks, after, stopped, saves, code, words):
    result = verdict(launcher, ranks, before={}, after=after, stopped=stopped, saves=saves)
    assert result.code == code
    assert words in result.reason


def test_what_an_earlier_start_left_in_the_status_is_not_believed():
    result = verdict(1, [1], before=SAVED, after=SAVED, stopped=None, saves=True)
    assert result.code == 1


def test_records_of_ranks_are_read_in_their_order(tmp_path):
    for rank in (10, 2):
        (tmp_path / f"rank_{rank:05d}.json").write_text(
            json.dumps({"rank": rank, "pid": 1, "code": None})
        )
    assert read_records(tmp_path) == [RankRecord(2, 1, None), RankRecord(10, 1, None)]


# A parallel environment

PE_HOSTFILE = "node1 2 long.q@node1 UNDEFINED\nnode3 2 long.q@node3 UNDEFINED\n"


def test_hosts_of_a_parallel_environment():
    assert hosts_of(PE_HOSTFILE + "node1 1 other.q@node1 UNDEFINED\n\n") == ["node1", "node3"]


def test_the_first_task_starts_the_others_by_script(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "qrsh"
    fake.write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$@" > {tmp_path}/called\nexec "$last"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    (tmp_path / "pe").write_text(PE_HOSTFILE)
    job = job_of(tmp_path, "x", mode="pe", nodes=2, site={"multi_node": "pe:mpi"})
    job.script.write_text(f'#!/bin/bash\necho "${NODE_TASK} $JOB_ID" > {tmp_path}/ran\n')
    environment = {"PE_HOSTFILE": str(tmp_path / "pe"), "JOB_ID": "42"}
    Slaves(job, environment).close()
    assert (tmp_path / "ran").read_text() == "2 42\n"
    words = (tmp_path / "called").read_text().split()
    assert words[:3] == ["-inherit", "-nostdin", "node3"]
    assert len(words) == 4
    assert Path(words[3]).is_file()


def test_a_parallel_environment_that_packs_hosts_is_refused(tmp_path):
    (tmp_path / "pe").write_text("node1 4 long.q@node1 UNDEFINED\n")
    job = job_of(tmp_path, "x", mode="pe", nodes=2, site={"multi_node": "pe:fill"})
    with pytest.raises(UserError, match=r"fill gave 1 host.* for 2 nodes; its allocation_rule"):
        Slaves(job, {"PE_HOSTFILE": str(tmp_path / "pe")})


def test_the_thin_script_says_how_to_call_it():
    script = Path(__file__).parents[2] / "cluster" / "node_run.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == PERSON
    assert "job.json" in done.stderr

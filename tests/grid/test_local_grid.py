"""The local grid's commands where no cluster is up: what they refuse, and what they leave alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from grid_cluster import SCRIPTS

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root is allowed to do this")
NOBODY = 65534


def call(
    name: str, *arguments: str, directory: Path, user: int | None = None
) -> tuple[int, str, str]:
    python = sys.executable if user is None else "/usr/bin/env"
    more = [] if user is None else ["python3"]
    done = subprocess.run(
        [python, *more, SCRIPTS / name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SPEECHLLM_LOCAL_GRID": str(directory)},
        user=user,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def cluster_with(directory: Path, pid: int, start_ticks: int) -> None:
    """What `up` leaves, of a cluster whose only host is a given process."""
    (directory / "host" / "head").mkdir(parents=True)
    (directory / "cluster.json").write_text(json.dumps({"hosts": 0, "slots": 1, "gpus": 0}))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = {"pid": pid, "start_ticks": start_ticks, "boot": boot}
    (directory / "host" / "head" / "process.json").write_text(json.dumps(record))


def ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_without_root_it_says_so(tmp_path: Path) -> None:
    user = None if os.geteuid() else NOBODY
    python = ["/usr/bin/env", "python3", "-c", f"open({str(SCRIPTS / 'console.py')!r})"]
    if user and subprocess.run(python, user=user, capture_output=True, check=False).returncode:
        pytest.skip("nobody but root can run python or read the repository here")
    for command in (["up"], ["up", "--check"]):
        code, _, said = call(*command, directory=tmp_path / "grid", user=user)
        assert code == 2
        assert "needs root" in said
        assert "sudo" in said
    assert not (tmp_path / "grid").exists()


@root_only
@pytest.mark.parametrize("command", [["run", "head", "true"], ["status"], ["kill-host", "node1"]])
def test_without_a_cluster_they_name_the_command_that_makes_one(
    tmp_path: Path, command: list[str]
) -> None:
    code, _, said = call(*command, directory=tmp_path / "grid")
    assert code == 2
    assert str(SCRIPTS / "up") in said


@root_only
def test_down_with_nothing_up_is_content(tmp_path: Path) -> None:
    assert call("down", directory=tmp_path / "grid")[:2] == (0, "nothing was up\n")


@root_only
def test_down_leaves_a_folder_alone_that_is_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    code, _, said = call("down", directory=tmp_path)
    assert code == 2
    assert "stays as it is" in said
    assert (tmp_path / "thesis.tex").exists()


@root_only
def test_down_ends_what_up_started(tmp_path: Path, other_process: subprocess.Popen[bytes]) -> None:
    directory = tmp_path / "grid"
    cluster_with(directory, other_process.pid, ticks(other_process.pid))
    assert call("down", directory=directory)[0] == 0
    assert other_process.wait(timeout=10) == -9
    assert not directory.exists()


@root_only
def test_down_spares_a_process_that_got_the_number_later(
    tmp_path: Path, other_process: subprocess.Popen[bytes]
) -> None:
    directory = tmp_path / "grid"
    cluster_with(directory, other_process.pid, ticks(other_process.pid) - 1)
    assert call("down", directory=directory)[0] == 0
    assert other_process.poll() is None
    assert not directory.exists()


@root_only
def test_a_cluster_of_somebody_else_is_not_trusted(
    tmp_path: Path, other_process: subprocess.Popen[bytes]
) -> None:
    directory = tmp_path / "grid"
    cluster_with(directory, other_process.pid, ticks(other_process.pid))
    os.chown(directory, NOBODY, NOBODY)
    code, _, said = call("down", directory=directory)
    assert code == 2
    assert "another user" in said
    assert other_process.poll() is None


def test_a_wrong_command_line_is_shown_the_right_one(tmp_path: Path) -> None:
    code, _, said = call("run", "head", directory=tmp_path)
    assert code == 2
    assert "HOST [-u USER] COMMAND" in said

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from speechllm.data.command import cached_output, run_command
from speechllm.errors import AudioError, UserError


def test_the_output_is_whole_and_binary(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert run_command("cat x | cat", 60, str(tmp_path)) == data
    assert run_command("printf '%s' \"$0 \\$HOME\"; echo warning >&2", 60) == b"sh $HOME"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo half; echo no disc >&2; exit 3", "exit code 3: echo half.*: no disc$"),
        ("no-such-program-here", "exit code 127: .*not found"),
        ("true", "no output: true"),
        ("kill -9 $$", "exit code 137"),
    ],
)
def test_a_failure_says_why(command: str, message: str) -> None:
    with pytest.raises(AudioError, match=f"^command failed: {message}"):
        run_command(command, 60)


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _await_end(path: Path) -> None:
    deadline = time.monotonic() + 30
    for pid in map(int, path.read_text().split()):
        while not _has_ended(pid):
            assert time.monotonic() < deadline, f"{pid} lives on"
            time.sleep(0.01)


# A pipeline whose parts do not notice that nobody reads from them.
PIPELINE = "sh -c 'echo $$ >> pids; sleep 600' | sh -c 'echo $$ >> pids; sleep 600'; echo x"


def test_a_slow_command_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(
        AudioError, match=r"command failed: no end after 0.5 s: .*--command-timeout"
    ):
        run_command(PIPELINE, 0.5, str(tmp_path))
    _await_end(tmp_path / "pids")


def _run_for_ever(directory: str) -> None:
    run_command(PIPELINE, 600, directory)


def test_commands_die_with_a_killed_worker(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(
        target=_run_for_ever, args=(str(tmp_path),)
    )
    worker.start()
    pids = tmp_path / "pids"
    deadline = time.monotonic() + 30
    while not pids.exists() or len(pids.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    _await_end(pids)


def test_a_cached_command_runs_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = "echo x >> runs; echo data"
    paths = {cached_output(command, 60, str(cache), str(tmp_path)) for _ in range(3)}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == b"data\n"
    assert (tmp_path / "runs").read_text() == "x\n"
    (tmp_path / "other").mkdir()
    cached_output(command, 60, str(cache), str(tmp_path / "other"))
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--command-cache .*cannot be written"):
        cached_output(command, 60, str(tmp_path / "file"), str(tmp_path))


def test_processes_of_one_number_on_two_hosts_share_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, host = os.replace, SimpleNamespace(nodename="one")
    monkeypatch.setattr(os, "uname", lambda: host)

    def overtaken(aside: str, path: str) -> None:
        monkeypatch.setattr(os, "replace", rename)
        host.nodename = "two"
        assert cached_output("echo x", 60, str(tmp_path)) == path
        rename(aside, path)

    monkeypatch.setattr(os, "replace", overtaken)
    path = Path(cached_output("echo x", 60, str(tmp_path)))
    assert path.read_bytes() == b"x\n"
    assert list(tmp_path.iterdir()) == [path]

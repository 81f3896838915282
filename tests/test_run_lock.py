from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import pytest
from forked_function import on_ranks
from forked_ranks import Ranks
from runs import TINY, metrics
from waiting import has_ended, wait_until

import speechllm.launcher
import speechllm.run_lock
import speechllm.train
from speechllm.checkpoint import find_checkpoint
from speechllm.cli import main
from speechllm.errors import UserError
from speechllm.report.status import read_status
from speechllm.run_lock import NAME, Holder, RunLock, sole_run
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
HOST = socket.gethostname()


@contextmanager
def held(directory: Path, *, leased: bool = False) -> Iterator[int]:
    """By another process, whose number it gives, and which is killed at the end."""
    ready, tell = os.pipe()
    if (pid := os.fork()) == 0:
        RunLock(directory, leased=leased).take()
        os.write(tell, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def holder_of(directory: Path, *, leased: bool = False) -> Holder | None:
    """As a start in a process of its own finds it."""
    lock = RunLock(directory, leased=leased)
    holder = lock.take()
    lock.release()
    return holder


def test_it_is_held_until_the_holder_is_killed(tmp_path: Path) -> None:
    with held(tmp_path) as pid:
        holder = holder_of(tmp_path)
        assert holder is not None
        assert (holder.pid, holder.host, holder.leased) == (pid, HOST, False)
    assert holder_of(tmp_path) is None


def test_the_refusal_says_who_and_what_to_do(tmp_path: Path) -> None:
    with (
        held(tmp_path) as pid,
        pytest.raises(UserError) as refused,
        sole_run(tmp_path, ALONE, leased=False, patience=0),
    ):
        pytest.fail("two at a time")
    assert refused.value.exit_code == 2
    for words in (f"run_dir={tmp_path}", f"process {pid} on {HOST}", f"kill {pid}", "another run_"):
        assert words in str(refused.value)


def test_all_ranks_are_refused_together(tmp_path: Path) -> None:
    def refused(world: World) -> str:
        try:
            with sole_run(tmp_path, world, leased=False, patience=0):
                return ""
        except UserError as error:
            return str(error)

    with held(tmp_path) as pid:
        first, second = on_ranks(2, tmp_path, refused)
    assert f"process {pid} on" in first
    assert first == second


def test_a_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(speechllm.run_lock, "_open", denied)
    with (
        pytest.raises(UserError, match=r"run_dir=.*cannot be written .*Permission denied"),
        sole_run(tmp_path, ALONE, leased=False),
    ):
        pytest.fail("not writable")


def test_without_locks_it_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with sole_run(tmp_path, ALONE, leased=False):
        assert caplog.text.count("has no locks (No locks available)") == 1


def test_among_jobs_the_lock_follows_the_lease(tmp_path: Path) -> None:
    with held(tmp_path, leased=True) as job, held(tmp_path, leased=True) as next_job:
        by_hand = holder_of(tmp_path)
        assert by_hand is not None
        assert (by_hand.pid, by_hand.leased) == (next_job, True)
        assert job != next_job
    with held(tmp_path) as pid:
        for_a_job = holder_of(tmp_path, leased=True)
        assert for_a_job is not None
        assert for_a_job.pid == pid
    assert holder_of(tmp_path, leased=True) is None


def test_a_lock_file_that_was_removed_holds_nobody_up(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / NAME).unlink()
        assert holder_of(tmp_path) is None
        with held(tmp_path) as pid:
            assert getattr(holder_of(tmp_path), "pid", None) == pid


def test_who_locks_a_file_that_is_replaced_meanwhile_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = speechllm.run_lock._open
    replaced: list[Path] = []

    def slow(path: Path) -> int:
        descriptor = real(path)
        if not replaced:
            replaced.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(speechllm.run_lock, "_open", slow)
    lock = RunLock(tmp_path, leased=False)
    assert lock.take() is None
    assert (tmp_path / NAME).is_file()
    lock.release()


def test_train_writes_nothing_where_it_is_refused(
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(speechllm.run_lock, "PATIENCE", 0.1)
    with held(tmp_path) as pid:
        assert main(["train", TINY, f"run_dir={tmp_path}", f"data.train={shards}"]) == 2
    assert os.listdir(tmp_path) == [NAME]
    waits, refused = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} is written by process {pid} on {HOST}" in waits
    assert refused.startswith(f"speechllm: run_dir={tmp_path}: another run writes there")


def rank_of_torchrun(rank: int) -> None:
    """Looks after it often, and is slow."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    speechllm.launcher.POLL = 0.05
    real = speechllm.train.run_step

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return real(*args, **kwargs)

    speechllm.train.run_step = slow


@pytest.mark.distributed
def test_ranks_whose_launcher_is_killed_save_and_the_next_start_waits_for_that(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    command = ["train", TINY, f"run_dir={run_dir}", f"data.train={shards}", "data.num_workers=0"]
    ranks = Ranks(tmp_path, command, plant=rank_of_torchrun)
    wait_until(lambda: bool(metrics(run_dir)))
    launcher, log = ranks.launchers[0]
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    with caplog.at_level("INFO", "speechllm"), sole_run(run_dir, ALONE, leased=False):
        assert f"is written by process {ranks.process(0)} on {HOST}" in caplog.text
        status = read_status(run_dir)
        newest = find_checkpoint(run_dir, prefer="last")
        assert status is not None
        assert status["state"] == "saved"
        assert newest.name == f"step_{status['step']:08d}"
    assert f"the launcher (process {launcher}) is gone" in log.read_text()
    for rank in (0, 1):
        wait_until(lambda rank=rank: has_ended(ranks.process(rank)))

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

import speechllm.launcher
from speechllm.launcher import LauncherWatch, launchers, parent_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"CROSS_RANK": "0"}
ABOVE = 77


def proc_with(directory: Path, *words: str) -> Path:
    """A /proc in which our parent is the child of a process ABOVE of that command line."""
    for pid in (os.getppid(), ABOVE):
        (directory / str(pid)).mkdir()
    (directory / str(os.getppid()) / "stat").write_text(f"9 (odd ) name) S {ABOVE} 1 1")
    (directory / str(ABOVE) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    return directory


def test_only_ranks_of_a_launcher_watch_it(tmp_path: Path) -> None:
    assert launchers({"RANK": "0", "LOCAL_RANK": "0"}) == []  # of a shell, which may go
    proc = proc_with(tmp_path, "bash", "train.sh")
    assert launchers(TORCHRUN, proc) == [os.getppid()]
    assert launchers(DEEPSPEED, proc) == [os.getppid()]
    assert launchers(DEEPSPEED, tmp_path / "none") == [os.getppid()]
    assert parent_of(os.getpid()) == os.getppid()


@pytest.mark.parametrize(
    "words",
    [
        ("/venv/bin/python", "/venv/bin/deepspeed", "--module", "speechllm"),
        ("python", "-m", "deepspeed.launcher.runner", "--no_ssh"),
    ],
)
def test_deepspeed_stands_above_its_launcher(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert launchers(DEEPSPEED, proc_with(tmp_path, *words)) == [os.getppid(), ABOVE]


def test_a_rank_that_cannot_save_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets SIGTERM when its launcher was killed, and SIGKILL some time after."""
    monkeypatch.setattr(speechllm.launcher, "POLL", 0.02)
    monkeypatch.setattr(speechllm.launcher, "GRACE", 0.2)
    told, tell = os.pipe()
    if (launcher := os.fork()) == 0:
        os.close(told)
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda *_: os.write(tell, b"SIGTERM "))
            with LauncherWatch(TORCHRUN):
                os.write(tell, b"runs ")
                while True:  # as in a collective with a rank that is gone
                    time.sleep(60)
        os.close(tell)
        time.sleep(60)
        os._exit(0)
    os.close(tell)
    assert os.read(told, 99) == b"runs "
    assert not select.select([told], [], [], 0.2)[0], "while the launcher lives"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    heard = b""
    while select.select([told], [], [], 20)[0] and (more := os.read(told, 99)):
        heard += more
    assert heard == b"SIGTERM "
    assert select.select([told], [], [], 0)[0], "its end closed the pipe"
    os.close(told)

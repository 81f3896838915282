"""A real Grid Engine for tests: started once, asked through its own command line, ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "cluster" / "local_grid"
USER = "griduser"
PATIENCE = 300.0  # on a machine that is busy with other tests, a job of two hosts starts slowly

T = TypeVar("T")


def why_not() -> str | None:
    """Why there is no grid on this machine, as `up --check` says it."""
    checked = subprocess.run(
        [sys.executable, SCRIPTS / "up", "--check"], capture_output=True, text=True, check=False
    )
    return None if checked.returncode == 0 else checked.stderr.strip()


def eventually(
    look: Callable[[], T | None], what: Callable[[], str] | str, *, pause: float = 0.2
) -> T:
    """The first value that is not None or False. Fails with `what` when patience is over."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {what if isinstance(what, str) else what()}")
        time.sleep(pause)
    return found


class Grid:
    """Three hosts of two slots. All paths that jobs use lie below `work`, which they may write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.work = directory / "shared"
        self.environment = {**os.environ, "SPEECHLLM_LOCAL_GRID": str(directory)}

    def script(self, name: str, *arguments: object) -> str:
        """Run one of the local grid's own commands; fails where that fails."""
        return self._output(name, *arguments)

    def on(self, host: str, *command: object, folder: Path | None = None) -> str:
        """What a command prints that the job user runs on a host."""
        return self._output("run", host, "-u", USER, *command, folder=folder or self.work)

    def on_master(self, *command: object) -> str:
        """What a command prints that the administrator runs on the master."""
        return self._output("run", "head", "-u", "root", *command)

    def _output(self, name: str, *arguments: object, folder: Path | None = None) -> str:
        done = self.attempt(name, *arguments, folder=folder)
        assert done.returncode == 0, f"{name} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self, name: str, *arguments: object, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", SCRIPTS / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=self.environment,
            timeout=PATIENCE,
        )

    def folder(self, name: str) -> Path:
        """A new folder of the job user's."""
        path = self.work / name
        self.on("head", "mkdir", path)
        return path

    def give(self, folder: Path) -> None:
        """Make the job user the owner of a folder with all that is in it."""
        owner = self.directory / "home" / USER
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.stat().st_uid, owner.stat().st_gid)

    def qsub(self, folder: Path, lines: str, *options: object) -> str:
        """Submit bash lines; the number of the job. Output goes to FOLDER/out.*"""
        script = folder / "job.sh"
        script.write_text(f"#!/bin/bash\n{lines}\n")
        given = ["-cwd", "-j", "y", "-o", folder, *options]
        answer = self.on("head", "qsub", "-terse", "-w", "e", *given, script, folder=folder)
        return answer.split(".")[0].strip()

    def states(self, job: str) -> dict[str, tuple[str, str]]:
        """Task ("" where it is no array, "2-4:1" for tasks that wait together) -> (state, host)."""
        found = {}
        for row in ElementTree.fromstring(self.on("head", "qstat", "-xml")).iter("job_list"):
            if row.findtext("JB_job_number") == job:
                host = (row.findtext("queue_name") or "").partition("@")[2]
                found[row.findtext("tasks") or ""] = (row.findtext("state") or "", host)
        return found

    def wait_for(self, job: str, state: str) -> None:
        """Until all tasks of a job have a state, as in r or Eqw."""
        eventually(
            lambda: (now := self.states(job)) and {one for one, _ in now.values()} == {state},
            lambda: f"job {job} to be {state}: {self.states(job)}",
            pause=0.5,
        )

    def wait_until_gone(self, job: str) -> None:
        # Asked from within: every entry into the cluster costs as much as many questions.
        look = f"while qstat -j {job} >/dev/null 2>&1; do sleep 0.3; done"

        def gone() -> bool:
            self.attempt("run", "head", "timeout", "60", "sh", "-c", look)
            return not self.states(job)

        eventually(gone, lambda: f"job {job}: {self.states(job)}\n{self.messages()}")

    def wait_until_missed(self, host: str, job: str) -> None:
        """Until the master has put back what of a job ran on a host that has died."""

        def missed() -> bool:
            return ("r", host) not in self.states(job).values()

        # After 35 s at most; but a master that failed to send something there first, and so knows
        # the host as silent, never looks again, unless it is told.
        deadline = time.monotonic() + 60
        while not missed():
            if time.monotonic() > deadline:
                self.attempt("run", "head", "-u", "root", "qconf", "-ke", host)
                break
            time.sleep(0.5)
        eventually(missed, lambda: f"{self.states(job)}\n{self.messages()}", pause=0.5)

    def messages(self) -> str:
        """The last of what the master had to say."""
        lines = (self.directory / "spool" / "qmaster" / "messages").read_text().splitlines()
        return "\n".join(lines[-30:])

    def hosts_of(self, job: str) -> list[str]:
        return sorted(host for _, host in self.states(job).values() if host)

    def exit_codes(self, job: str, count: int = 1) -> list[int]:
        """Of the job's tasks and their repetitions, in the order in which they ended."""

        def look() -> list[int] | None:
            done = self.attempt("run", "head", "-u", USER, "qacct", "-j", job)
            lines = [line.split() for line in done.stdout.splitlines()]
            codes = [int(words[1]) for words in lines if words[:1] == ["exit_status"]]
            return codes if len(codes) >= count else None

        return eventually(look, f"the accounting of job {job}")

    def start(self) -> None:
        """Start the hosts, later those that a test has killed."""
        # The end of the tests, were it by kill -9, is the end of the cluster.
        visible = [word for path in (sys.prefix, sys.base_prefix) for word in ("--expose", path)]
        self.script("up", "--hosts", 3, "--with-process", os.getpid(), *visible)


@contextmanager
def cluster() -> Iterator[Grid]:
    # Below pytest's own folders only their owner may walk.
    above = Path(tempfile.mkdtemp(prefix="speechllm-grid-test-"))
    above.chmod(0o755)
    grid = Grid(above / "cluster")
    try:
        grid.start()
        yield grid
    finally:
        grid.attempt("down")
        shutil.rmtree(above)

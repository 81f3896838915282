"""When a rank fails: every log ends in the failure that came first, and no rank waits for long.

A rank that fails writes RUN/failures/rank_N.json at once. The others fail next, in a collective
that broke off or timed out, find that record, and end with its exit code and without a tale of
their own; a rank that hangs elsewhere is ended by a thread that watches for records. Where no
record tells the cause, a rank was killed or hangs, and the others say which.

Exit codes of a failed rank: that of the cause where it is a UserError, else 1. Launchers:
`torchrun` itself exits with 1 whatever its ranks exit with (also 2 and 99), and ends its output
with what it finds in TORCHELASTIC_ERROR_FILE, which is the cause here; `deepspeed` hands on the
code of the first rank that it sees ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch.distributed as dist

from speechllm.errors import UserError
from speechllm.world import World

# Seconds. torchrun and deepspeed kill what still runs 30 s after they saw the first rank end.
POLL = 0.1
FOR_ALL_RECORDS = 1.0  # the cause is known: who else fails at the same moment?
WATCH_EVERY = 5.0  # each a listing of a directory that may lie on a file server
FOR_THE_LOOP = 5.0  # to find out by itself, and to end the checkpoint that is being written
FOR_A_CAUSE = 12.0  # as long as the watch of a rank that hangs may take

Kind = Literal["user", "error", "contact", "hang"]
RANKING: tuple[Kind, ...] = ("user", "error", "contact", "hang")


@dataclass(frozen=True)
class Place:
    """Of a rank. launcher: the same for ranks whose output goes to one log."""

    host: str
    process: int
    launcher: str


@dataclass(frozen=True)
class Failure:
    """kind: `user` is a UserError, `contact` a collective that another rank made fail, `hang` what
    the watch ended. time: Unix, seconds. attempt: which start of the run; the records of others
    mean nothing."""

    rank: int
    attempt: str
    time: float
    kind: Kind
    text: str
    exit_code: int = 1


class FailureReport:
    """A context manager around all that the ranks of a run do together.

    With several ranks an exception inside becomes the report and the end of the process, by
    `os._exit`: the ordinary end of an interpreter may wait for threads and ranks that never answer.
    Enter it inside StopSignals, or the SIGTERM by which launchers end the other ranks would end
    them before they have reported. With one rank the exception goes on, and `log` has it too.

    Args:
        directory: for the records; shared by all ranks.
        log: a file to whose end the report is put as well.
    """

    def __init__(self, directory: Path, world: World, *, log: Path | None = None) -> None:
        self.directory = directory
        self.log = log
        self.world = world
        self.attempt = ""
        self.places: list[Place] = []
        self._over = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> FailureReport:
        host = socket.gethostname()
        mine = Place(host, os.getpid(), f"{host}:{os.getppid()}")
        everyone = self.world.gather([time.time_ns(), asdict(mine)])
        self.attempt = str(everyone[0][0])
        self.places = [Place(**place) for _, place in everyone]
        if self.world.is_main:
            for path in self.directory.glob("rank_*.json"):
                if _read(path, self.attempt) is None:
                    path.unlink(missing_ok=True)
        if self.world.size > 1:
            threading.Thread(target=self._watch, name="failures", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if isinstance(error, Exception):  # not Ctrl-C, not sys.exit
            code = error.exit_code if isinstance(error, UserError) else 1
            self._end(_kind(error), _text(error), code)

    def _end(self, kind: Kind, text: str, code: int = 1) -> None:
        self._ending.acquire()  # never released: the loop and the watch do not both come here
        mine = Failure(self.world.rank, self.attempt, time.time(), kind, text, code)
        if self.world.size == 1:
            self._append_to_log(text)
            tell_torchrun(mine, mine.rank)
            return
        failures = self._settle(mine)
        told = failures[0]
        if told.kind != "user":
            told = replace(told, text=self._explained(failures))
        tell_torchrun(told, mine.rank)
        if told.rank == mine.rank:
            self._append_to_log(told.text)
        if mine.rank == speaker(failures, self.places, self.places[mine.rank].launcher):
            sys.stderr.write(told.text)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(told.exit_code)

    def _settle(self, mine: Failure) -> list[Failure]:
        """Write mine; everyone's, the cause first, once it is plain that no more will come."""
        self._keep(mine)
        start = time.monotonic()
        while True:
            others = [failure for failure in self._read_all() if failure.rank != mine.rank]
            failures = in_order([mine, *others])
            caused = failures[0].kind in ("user", "error")
            gone = all(self._state(rank) == "dead" for rank in self._missing(failures))
            patience = FOR_ALL_RECORDS if caused or gone else FOR_A_CAUSE
            if len(failures) == self.world.size or time.monotonic() - start > patience:
                return failures
            time.sleep(POLL)

    def _missing(self, failures: Sequence[Failure]) -> list[int]:
        return sorted(set(range(self.world.size)) - {failure.rank for failure in failures})

    def _state(self, rank: int) -> Literal["alive", "dead", "unknown"]:
        place = self.places[rank]
        if place.host != self.places[self.world.rank].host:
            return "unknown"
        return "alive" if _lives(place.process) else "dead"

    def _explained(self, failures: Sequence[Failure]) -> str:
        """The first traceback; where another rank that says nothing caused it, which and why."""
        first, size = failures[0], self.world.size
        host = self.places[first.rank].host
        if first.kind == "error":
            return f"rank {first.rank} of {size} failed on {host}:\n{first.text}"
        text = f"rank {first.rank} of {size} on {host} lost contact:\n{first.text}"
        missing = self._missing(failures)
        for rank in missing:
            what = {
                "dead": "was lost without a traceback: killed (out of memory?), or crashed",
                "alive": "runs but did not answer within collective_timeout",
                "unknown": "gave no sign of life: killed, hanging, or its machine is gone",
            }[self._state(rank)]
            text += f"speechllm: {self._named(rank)} {what}.\n"
        for failure in failures:
            if failure.kind == "hang" and not missing:
                text += failure.text
                text += f"speechllm: {self._named(failure.rank)} did not answer within "
                text += "collective_timeout: it was at the place above.\n"
        return text + "The same command goes on from the newest checkpoint.\n"

    def _named(self, rank: int) -> str:
        return f"rank {rank} (process {self.places[rank].process} on {self.places[rank].host})"

    def _watch(self) -> None:
        """End this rank where another has failed and the loop does not find out: it waits in a
        collective that cannot be broken off (NCCL), or hangs in a read."""
        main = threading.main_thread().ident
        while not self._over.wait(WATCH_EVERY):
            if self._read_all() and not self._over.wait(FOR_THE_LOOP):
                stack = traceback.format_stack(sys._current_frames()[main or 0])
                self._end("hang", "Stack (most recent call last):\n" + "".join(stack))

    def _read_all(self) -> list[Failure]:
        paths = self.directory.glob("rank_*.json")
        return [found for path in paths if (found := _read(path, self.attempt)) is not None]

    def _keep(self, failure: Failure) -> None:
        path = self.directory / f"rank_{failure.rank}.json"
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(asdict(failure)), encoding="utf-8")
            aside.replace(path)
        except OSError as error:  # a full disk is often the very cause
            sys.stderr.write(f"speechllm: {path}: not written ({error})\n")

    def _append_to_log(self, text: str) -> None:
        if self.log is None:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{now} rank {self.world.rank} ERROR {text}")
        except OSError as error:
            sys.stderr.write(f"speechllm: {self.log}: not written ({error})\n")


def in_order(failures: Sequence[Failure]) -> list[Failure]:
    """By time, but what another rank caused comes later: clocks of hosts differ."""
    return sorted(failures, key=lambda f: (max(RANKING.index(f.kind), 1), f.time, f.rank))


def speaker(failures: Sequence[Failure], places: Sequence[Place], launcher: str) -> int | None:
    """The rank that prints to the log of that launcher: the first to fail where it is one of its
    ranks, else the lowest that failed."""
    here = [failure.rank for failure in failures if places[failure.rank].launcher == launcher]
    return failures[0].rank if failures[0].rank in here else min(here, default=None)


def _kind(error: Exception) -> Kind:
    if isinstance(error, UserError):
        return "user"
    # gloo's errors are plain RuntimeErrors; the message names the source file, .../gloo/....cc
    broken_off = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    return "contact" if broken_off or isinstance(error, dist.DistError) else "error"


def _text(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"speechllm: {error}\n"
    return "".join(traceback.format_exception(error))


def _read(path: Path, attempt: str) -> Failure | None:
    """None where there is nothing of this attempt (written by rename, so never half of it)."""
    try:
        failure = Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError):  # none, or of another version
        return None
    return failure if failure.attempt == attempt else None


def _lives(process: int) -> bool:
    """Of this host; a process that has ended but was not waited for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def tell_torchrun(failure: Failure, rank: int) -> None:
    """It ends its output with the `py_callstack` of the earliest of its ranks, by whole seconds.

    rank: this one, which may have failed because of that failure.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    moment = int(failure.time) + (rank != failure.rank)
    about = {"py_callstack": failure.text, "timestamp": str(moment)}
    message = {"message": failure.text, "extraInfo": about}
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"speechllm: {path}: not written ({error})\n")

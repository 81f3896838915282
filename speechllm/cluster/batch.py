"""What the two kinds of batch systems have in common: clients run as lists of arguments."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from speechllm.errors import UserError

State = Literal["pending", "held", "running", "suspended", "deleting", "error"]


class BatchError(UserError):
    """The batch system refuses, and says why."""


class BatchAway(BatchError):
    """The batch system does not answer; what was asked for may be right."""


@dataclass(frozen=True)
class QueuedTask:
    """A job in the queue, or one task of an array job.

    task: None where the job is no array. host: where it runs. code: the state as the batch system
    writes it. since: when it was started, or else submitted, as the batch system writes it.
    """

    job_id: str
    name: str
    state: State
    code: str
    task: int | None = None
    host: str | None = None
    since: str = ""
    slots: int = 1


@dataclass(frozen=True)
class Output:
    code: int
    out: str
    err: str


class Batch(Protocol):
    def submit(self, arguments: Sequence[str], name: str) -> str: ...

    def queued(self) -> list[QueuedTask]: ...

    def why_pending(self, job_id: str) -> list[str]: ...

    def exit_codes(self, job_id: str, task: int | None) -> list[int]: ...

    def delete(self, job_ids: Sequence[str]) -> None: ...


@dataclass(frozen=True)
class Client:
    """Runs the batch system's own commands, with `prefix` before each; patient where it is busy.

    patience: seconds for which a busy system is asked again.
    """

    prefix: tuple[str, ...] = ()
    patience: float = 300.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, *words: str) -> Output:
        """Raises BatchError where there is no such command."""
        try:
            done = subprocess.run(
                [*self.prefix, *words],
                capture_output=True,
                text=True,
                errors="replace",  # other jobs' names and messages may be of another locale
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise BatchError(
                f"{(*self.prefix, *words)[0]} cannot be run ({error.strerror}); work on a submit "
                "host, or give the profile a `client` that reaches one"
            ) from None
        return Output(done.returncode, done.stdout, done.stderr.strip())

    def patiently(self, *words: str, is_busy: Callable[[Output], bool]) -> Output:
        """`run`, and again with growing pauses while the system is busy.

        Raises BatchAway when patience is at its end.
        """
        waited, pause = 0.0, 1.0
        while True:
            output = self.run(*words)
            if not is_busy(output):
                return output
            if waited >= self.patience:
                raise BatchAway(
                    f"{words[0]}: the batch system does not answer since {waited:.0f} s: "
                    f"{output.err}"
                )
            self.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, 60.0)

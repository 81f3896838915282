"""What each start of each node came to, and when starting again has become useless.

RUN/cluster/NAME/attempts/TASK_NUMBER.json is one start of one task, written by that start alone;
attempts.jsonl beside it is made out of them: one line for each start and each end of the whole job.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.group import AGAIN, PERSON, Result
from speechllm.cluster.job import Job


@dataclass
class Attempt:
    """One start of one task. started, ended: Unix seconds of the file server, as clocks of hosts
    differ; ended and code are None while it runs, and for ever where it was killed. step: of the
    newest checkpoint then. generation, hosts: of the group that it worked in, once there was one.
    """

    task: int
    number: int
    job_id: str | None
    host: str
    started: float
    step_before: int | None
    generation: int | None = None
    rank: int | None = None
    hosts: list[str] = field(default_factory=list)
    ended: float | None = None
    step_after: int | None = None
    code: int | None = None
    reason: str | None = None


class Attempts:
    """The records of one job, and this start's own."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = SharedFolder(job.own / "attempts")

    def read(self) -> list[Attempt]:
        """In the order of tasks and starts."""
        texts = (self.folder.read(name) for name in self.folder.names())
        return [Attempt(**json.loads(text)) for text in texts if text is not None]

    def begin(self, task: int, job_id: str | None, host: str) -> Attempt:
        numbers = [one.number for one in self.read() if one.task == task]
        attempt = Attempt(task, max(numbers, default=0) + 1, job_id, host, time.time(), self.step())
        # Where a start overlaps with the one before it, both count the same records.
        while not self.folder.publish(_file(attempt), _text(attempt)):
            attempt.number += 1
        attempt.started = self.folder.touch(_file(attempt))
        self.folder.write(_file(attempt), _text(attempt))
        return attempt

    def end(self, attempt: Attempt, result: Result) -> None:
        attempt.ended, attempt.step_after = self.folder.touch(_file(attempt)), self.step()
        attempt.code, attempt.reason = result.code, result.reason
        self.save(attempt)

    def save(self, attempt: Attempt) -> None:
        self.folder.write(_file(attempt), _text(attempt))
        text, written = self._list(), None
        # Nodes end together: what one has made before another's record came must not stay last.
        while text != written:
            SharedFolder(self.job.own).write(self.job.attempts.name, text)
            text, written = self._list(), text

    def _list(self) -> str:
        return "".join(json.dumps(event) + "\n" for event in events(self.read()))

    def step(self) -> int | None:
        """Of the newest complete checkpoint; None where there is none."""
        markers = self.job.run.glob("checkpoints/step_*/COMPLETE")
        steps = [
            int(m[1]) for one in markers if (m := re.fullmatch(r"step_(\d+)", one.parent.name))
        ]
        return max(steps, default=None)


def without_progress(attempts: Sequence[Attempt], task: int, step: int | None) -> list[Attempt]:
    """The task's last starts in a row, oldest first, that began at the step that still is the last.

    Those before a person was asked do not count, nor those of a job that was submitted earlier:
    after that the job was started by a person.
    """
    found: list[Attempt] = []
    for one in sorted(attempts, key=lambda one: one.number, reverse=True):
        if one.task != task:
            continue
        if one.step_before != step or one.code in (0, PERSON):
            break
        if found and one.job_id != found[-1].job_id:
            break
        found.insert(0, one)
    return found


def judge(
    result: Result, attempts: Sequence[Attempt], task: int, step: int | None, most: int
) -> Result:
    """`result`, or a person is asked where it was to be "again" for the `most`-th time in vain."""
    vain = without_progress(attempts, task, step)
    if result.code != AGAIN or len(vain) < most:
        return result
    where = "no checkpoint yet" if step is None else f"the newest checkpoint is still step {step}"
    vain_for = f"{len(vain)} attempts in a row without progress ({where})"
    reasons = "; ".join(dict.fromkeys(one.reason or "killed" for one in vain[:-1]))
    earlier = f" Before that: {reasons}" if reasons else ""
    return Result(PERSON, f"{vain_for}. The last: {result.reason}.{earlier}")


def events(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Starts and ends of the whole job, by time: those of the first node of each group, and of the
    first task where none was formed; and wherever a person is asked."""
    first = min((one.task for one in attempts), default=0)
    lines: list[dict[str, Any]] = []
    for one in attempts:
        common = {"task": one.task, "job_id": one.job_id, "generation": one.generation}
        leads = one.rank == 0 or (one.rank is None and one.task == first)
        if leads:
            hosts = one.hosts or [one.host]
            begin = {"time": one.started, "hosts": hosts, "step": one.step_before}
            lines.append({"event": "start", **common, **begin})
        if one.code is not None and (leads or one.code == PERSON):
            end = {"time": one.ended, "step": one.step_after, "code": one.code}
            lines.append({"event": "end", **common, **end, "reason": one.reason})
    return sorted(lines, key=lambda line: float(line["time"]))


def _file(attempt: Attempt) -> str:
    return f"{attempt.task:04d}_{attempt.number:04d}.json"


def _text(attempt: Attempt) -> str:
    return json.dumps(asdict(attempt)) + "\n"

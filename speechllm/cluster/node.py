"""The node runner: one on each host of a job, `python -m speechllm.cluster.node JOB.json`.

Claims GPUs, meets the other nodes, starts the processes, hands signals on, and ends with
    0    done
    99   stopped with a checkpoint, or something beyond the program's reach went wrong: run me again
    100  a person is needed: the input is wrong, or attempts bring no progress
    else the program failed
"""

from __future__ import annotations

import os
import random
import re
import shlex
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from speechllm.cluster.attempts import Attempt, Attempts, judge, without_progress
from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.gpus import Claimed, GpusBusy, claim_gpus
from speechllm.cluster.group import AGAIN, PERSON, Generation, Member, Result
from speechllm.cluster.job import Job, read_job
from speechllm.cluster.launch import (
    Place,
    hostfile_text,
    launch_command,
    launch_environment,
    place_of,
)
from speechllm.cluster.lease import Lease
from speechllm.cluster.meeting import Agreed, Meeting, Rules
from speechllm.cluster.network import HeldPort, own_address
from speechllm.cluster.processes import Processes
from speechllm.cluster.signals import StopWish
from speechllm.cluster.slaves import NODE_TASK, Slaves
from speechllm.cluster.verdict import verdict
from speechllm.errors import UserError
from speechllm.log import logger, set_up_logging
from speechllm.report.status import read_status

POLL = 0.2
T = TypeVar("T")
CANCELLED = "the wish to cancel"


class Gate:
    """What the first node of a group holds: the lease on the run directory, and a port."""

    def __init__(self, lease: Lease | None, ports: tuple[int, int]) -> None:
        self.lease = lease
        self._ports = ports
        self._held: HeldPort | None = None

    @property
    def port(self) -> int:
        assert self._held is not None
        return self._held.port

    def take(self) -> str | None:
        if self.lease is not None and (busy := self.lease.take()):
            return busy
        if self._held is None:
            self._held = HeldPort(self._ports)
        return None

    def renew(self) -> bool:
        """False where a lease that we held is lost."""
        return self.lease is None or self.lease.name is None or self.lease.renew()

    def give_back(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
        if self.lease is not None:
            self.lease.release()


@dataclass
class Node:
    """One start of one node. task: from 1."""

    job: Job
    task: int
    stop: StopWish
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        self.began = time.time()
        self.host = socket.gethostname()
        self.token = uuid.uuid4().hex
        limit = self.job.time_limit
        self.deadline = None if limit is None else self.began + limit - self.job.site.time.margin
        lease = None
        if self.job.kind == "train":
            where = SharedFolder(self.job.run / "cluster" / "lease")
            job_id = self.environment.get("JOB_ID", "?")
            holder = f"job {self.job.name} ({job_id}), task {self.task} on {self.host}"
            lease = Lease(where, self.token, holder, self.job.site.meeting.stale_after)
            self._leases = where.path
        self.gate = Gate(lease, self.job.site.ports)
        self.meeting: Meeting | None = None
        self.patience = self.job.site.meeting.timeout
        self._said = ""

    def run(self) -> Result:
        """The whole life of the node. Every end of it is recorded and has a reason."""
        attempts = Attempts(self.job)
        attempt = attempts.begin(self.task, self.environment.get("JOB_ID"), self.host)
        vain = without_progress(attempts.read(), self.task, attempt.step_before)
        # Groups that got half of their hosts each must not leave at the same time, nor soon again.
        backed_off = min(0.5 + 0.5 * len(vain), 3.0) * random.uniform(1.0, 1.25)
        self.patience = self.job.site.meeting.timeout * backed_off
        try:
            result = self._work(attempts, attempt)
        except GpusBusy as error:
            result = Result(AGAIN, str(error))
        except UserError as error:
            result = Result(PERSON, str(error))
        except OSError as error:
            result = Result(AGAIN, f"the file system is in trouble: {error}")
        # An end that cannot be written down, as on a full disk, is the same end.
        return _answer(lambda: self._record(attempts, attempt, result)) or result

    def _record(self, attempts: Attempts, attempt: Attempt, result: Result) -> Result:
        if not self.job.cancel.exists():
            attempts.end(attempt, result)  # its reason is part of what is judged
            most = self.job.max_attempts
            result = judge(result, attempts.read(), self.task, attempts.step(), most)
        elif result.code == AGAIN:
            result = Result(0, f"cancelled: {result.reason}")
        attempts.end(attempt, result)
        return result

    def _work(self, attempts: Attempts, attempt: Attempt) -> Result:
        if self._stop_wanted():
            return Result(AGAIN, f"stopped by {self.stop.reason} before it began")
        with ExitStack() as stack:
            if self.job.mode == "pe" and NODE_TASK not in self.environment:
                stack.callback(Slaves(self.job, self.environment).close)
            claim = claim_gpus(
                self.job.site.gpu_claim,
                self.job.gpus_per_node,
                patience=self.patience,
                give_up=self._stop_wanted,
                environment=self.environment,
            )
            claimed = stack.enter_context(claim)
            stack.callback(_answer, self.gate.give_back)
            group = self._meet(stack)
            if isinstance(group, Result):
                return group
            place = self._place(group)
            attempt.generation = group.number if group is not None else None
            attempt.rank = place.node_rank
            attempt.hosts = [m.host for m in group.members] if group is not None else [self.host]
            attempts.save(attempt)
            records = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="speechllm-")))
            return self._conclude(group, self._launch(place, group, claimed, records))

    # Before the start

    def _meet(self, stack: ExitStack) -> Generation | Result | None:
        """The group; None: this node works alone, and may write."""
        times = self.job.site.meeting
        if self.job.mode == "single" or not self.job.is_launched:
            return self._wait_for_lease()
        rules = Rules(
            nodes=self.job.nodes,
            min_nodes=self.job.min_nodes if self.job.mode == "array" else self.job.nodes,
            timeout=self.patience,
            settle=times.timeout / 3,
            stale_after=times.stale_after,
        )
        address = own_address(self.job.site.network_interface)
        me = Member(self.task, self.token, self.host, address)
        self.meeting = Meeting(SharedFolder(self.job.meeting), me, rules, self.gate)
        stack.callback(_answer, self.meeting.leave)
        while True:
            state = _answer(self.meeting.step)
            if not self.gate.renew():
                return Result(AGAIN, "lost the lease on the run directory while meeting")
            if isinstance(state, Agreed):
                return state.generation
            if isinstance(state, Result):
                return state
            if (result := self._wait(state.reason if state is not None else "")) is not None:
                return result

    def _wait_for_lease(self) -> Result | None:
        deadline = time.monotonic() + self.patience
        while (busy := self.gate.take()) is not None:
            if time.monotonic() > deadline:
                return Result(AGAIN, f"waited {self.patience:.0f} s: {busy}")
            if (result := self._wait(busy)) is not None:
                return result
        return None

    def _place(self, group: Generation | None) -> Place:
        if group is None:
            return Place(0, 1, "127.0.0.1", self.gate.port)
        assert self.meeting is not None
        return place_of(group, self.meeting.me)

    def _wait(self, reason: str) -> Result | None:
        """A moment; a Result where we are to stop instead."""
        if re.sub(r"\d+ s ago", "", reason) != self._said:
            logger.info("waiting: %s", reason)
            self._said = re.sub(r"\d+ s ago", "", reason)
        time.sleep(min(self.job.site.meeting.heartbeat, 1.0))
        if self._stop_wanted():
            return Result(AGAIN, f"stopped by {self.stop.reason} while waiting: {reason}")
        return None

    def _stop_wanted(self) -> bool:
        if self.deadline is not None and time.time() > self.deadline:
            self.stop.ask("the time limit")
        if _answer(self.job.cancel.exists):
            self.stop.ask(CANCELLED)
        return self.stop.reason is not None

    # While the processes run

    def _launch(
        self, place: Place, group: Generation | None, claimed: Claimed, records: Path
    ) -> Result:
        """Start the processes and look after them to their end; how this node's ended."""
        job = self.job
        hostfile = job.own / f"hostfile.{self.token}"
        if job.launcher == "deepspeed":
            hosts = [member.host for member in group.members] if group else [self.host]
            hostfile.write_text(hostfile_text(hosts, job.procs_per_node), encoding="utf-8")
        command = launch_command(job, place, hostfile)
        lease = self.gate.lease
        held = (
            None if lease is None or lease.name is None else (self._leases / lease.name, self.token)
        )
        environment = launch_environment(
            job, records, devices=claimed.environment, deadline=self.deadline, lease=held,
            environment=self.environment,
        )  # fmt: skip
        saves = job.kind == "train"
        before = self._status()
        logger.info("node %d of %d: %s", place.node_rank + 1, place.nodes, shlex.join(command))
        logger.info("each process runs: python %s", shlex.join(job.after_python))
        processes = Processes(
            command, environment, directory=job.directory, records=records, saves=saves
        )
        try:
            trouble = self._look_after(processes, group)
        finally:
            processes.kill()
            hostfile.unlink(missing_ok=True)
        if trouble is not None:
            return trouble
        code = processes.poll()
        assert code is not None
        return verdict(
            code, processes.codes(), before=before, after=self._status(),
            stopped=self.stop.reason, saves=saves,
        )  # fmt: skip

    def _status(self) -> dict[str, Any]:
        """RUN/status.json where it is ours: other kinds work beside a training."""
        return (read_status(self.job.run) or {}) if self.job.kind == "train" else {}

    def _look_after(self, processes: Processes, group: Generation | None) -> Result | None:
        """Until they have ended, or have to be ended for the Result's reason."""
        next_beat = 0.0
        told = None
        while processes.poll() is None:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.job.site.meeting.heartbeat
                self._stop_wanted()
                trouble = _answer(lambda: self._beat(group))
                if trouble is not None:
                    logger.warning("ending the processes here: %s", trouble.reason)
                    return trouble
            if self.stop.reason is not None:
                if told is None:
                    told = self.stop.reason
                    logger.info("%s: asking the processes to save and end", told)
                processes.stop(self.stop.number)
            time.sleep(POLL)
        return None

    def _beat(self, group: Generation | None) -> Result | None:
        """Signs of life to the others; a Result where it is over."""
        if not self.gate.renew():
            return Result(AGAIN, "lost the lease on the run directory")
        if group is None:
            return None
        assert self.meeting is not None
        return self.meeting.watch(group)

    def _conclude(self, group: Generation | None, own: Result) -> Result:
        if group is None:
            return own
        meeting = self.meeting
        assert meeting is not None
        while (result := _answer(lambda: meeting.conclude(group, own))) is None:
            if (stopped := self._wait(f"{own.reason}; now for how the others ended")) is not None:
                return stopped
        return result


def _answer(ask: Callable[[], T]) -> T | None:
    """None also where the shared folder does not answer; those who ask bound how long that goes."""
    try:
        return ask()
    except OSError as error:
        logger.warning("the shared folder does not answer: %s", error)
        return None


def task_number(environment: Mapping[str, str]) -> int:
    """1, 2, ...: of the array or of the parallel environment; 1 for a job that is neither."""
    number = environment.get(NODE_TASK) or environment.get("SGE_TASK_ID", "")
    return int(number) if number.isdecimal() else 1


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if len(words) != 1:
        print("usage: python -m speechllm.cluster.node RUN/cluster/NAME/job.json", file=sys.stderr)
        return PERSON
    set_up_logging()
    with StopWish() as stop:
        try:
            task = task_number(os.environ)
            job = read_job(Path(words[0])).for_task(task)
        except UserError as error:
            logger.error("%s", error)
            return PERSON
        result = Node(job, task, stop).run()
    logger.info("exit code %d: %s", result.code, result.reason)
    return result.code


if __name__ == "__main__":
    sys.exit(main())

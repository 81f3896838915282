"""How the nodes of one run find each other through a shared folder, and notice when one is gone.

A state machine: `Meeting.step` looks at the folder, does at most one thing, and says where it
stands; the caller sleeps between steps. Files, where G counts generations and TOKEN names one start
of one node:

    member_TASK_TOKEN.json     who it is; touched as a sign of life; removed when it leaves
    generation_G.json          the proposal: members in the order of their ranks, master's port
    generation_G.agreed.TOKEN  that member is there
    generation_G.decision      `go`, or `abort` and why
    generation_G.result.TOKEN  exit code and reason: that member's processes have ended

Proposal and decision are made once and never changed (`Folder.publish`), so no two starts can
believe in different members of one generation. `go` is published only by one that has seen
every member agree. A generation is over when it was aborted, or when each member has left or shown
no sign of life for `stale_after`; only then may the next one be proposed, so two generations do not
run at a time. A member that was silent itself for two thirds of that (suspended, or the server
hung) leaves by itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from speechllm.cluster.folder import Folder
from speechllm.cluster.group import AGAIN, PERSON, Generation, Member, Result, agree_on


@dataclass(frozen=True)
class Rules:
    """Times in seconds. settle: how long a group of `min_nodes` waits for more to come."""

    nodes: int
    min_nodes: int
    timeout: float
    settle: float
    stale_after: float


@dataclass(frozen=True)
class Waiting:
    reason: str


@dataclass(frozen=True)
class Agreed:
    """Every member has agreed: start now."""

    generation: Generation


class Gate(Protocol):
    """What the proposer must hold before it proposes: a lease and a free port."""

    def take(self) -> str | None:
        """None when held; else why not yet."""

    def give_back(self) -> None: ...

    @property
    def port(self) -> int: ...


class Meeting:
    def __init__(
        self,
        folder: Folder,
        me: Member,
        rules: Rules,
        gate: Gate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.rules = rules
        self.gate = gate
        self._clock = clock
        self._start = self._unchanged_since = self._heard = clock()
        self._candidates: list[str] = []
        self._first_end: float | None = None  # of a member that ended well
        self._bound: int | None = None  # generation that we agreed to
        folder.write(me.file, _text(asdict(me)))
        self.me = replace(me, joined=folder.touch(me.file))
        folder.write(me.file, _text(asdict(self.me)))

    # Coming together

    def step(self) -> Waiting | Agreed | Result:
        """One look, at most one act. A Result means: leave with that code."""
        if self._bound is not None and self._lapsed():
            return self._lapse()
        view = self._look()
        newer = [m for m in view.fresh if m.task == self.me.task and _age(m) > _age(self.me)]
        if newer:
            return Result(AGAIN, f"a newer start of this task has come: {newer[0]}")
        waiting = self._at_the_last_generation(view)
        if not isinstance(waiting, str):
            return waiting
        if self._clock() - self._start > self.rules.timeout:
            return self._out_of_patience(view, waiting)
        return Waiting(waiting)

    def _at_the_last_generation(self, view: View) -> str | Agreed | Result:
        last = view.last
        if last is None:
            return self._gather(view, 1)
        name, mine = _name(last.number), any(m.token == self.me.token for m in last.members)
        decision = self.folder.read(f"{name}.decision")
        if decision is None:
            return self._decide(view, last, mine)
        if decision.startswith("abort") or not view.alive(last):
            if decision.startswith("abort") and last.master.token == self.me.token:
                self.gate.give_back()
            self._bound = None
            return self._gather(view, last.number + 1)
        if mine:
            self._bound = last.number
            gone = [m for m in last.members if not view.is_alive(last, m)]
            if gone:
                return Result(AGAIN, f"{gone[0]} left before the group began", cause=False)
            return Agreed(last)
        who = ", ".join(str(m) for m in last.members if view.is_alive(last, m))
        return f"generation {last.number} of this job still runs: {who}"

    def _decide(self, view: View, last: Generation, mine: bool) -> str | Agreed | Result:
        """A proposal is open: agree to it, and make the decision when it is clear."""
        name = _name(last.number)
        if mine and self._bound != last.number:
            self.folder.write(f"{name}.agreed.{self.me.token}", "")
            self._bound = last.number
            return f"agreed to generation {last.number}"
        missing = [m for m in last.members if f"{name}.agreed.{m.token}" not in view.names]
        if mine and not missing:
            self.folder.publish(f"{name}.decision", f"go\nby {self.me}\n")
            return f"all agreed to generation {last.number}"
        age = view.now - (self.folder.time_of(f"{name}.json") or view.now)
        if age > self.rules.stale_after:
            late = missing[0] if missing else last.master
            self.folder.publish(f"{name}.decision", f"abort\n{late} did not answer; {self.me}\n")
        return f"generation {last.number} waits for {', '.join(map(str, missing))}"

    def _gather(self, view: View, number: int) -> str:
        newest = {m.task: m for m in sorted(view.fresh, key=_age)}
        members = [newest[task] for task in sorted(newest)][: self.rules.nodes]
        tokens = [m.token for m in members]
        if tokens != self._candidates:
            self._candidates, self._unchanged_since = tokens, self._clock()
        here = (
            f"{len(members)} of {self.rules.nodes} nodes are here ({', '.join(map(str, members))})"
        )
        settled = self._clock() - self._unchanged_since >= self.rules.settle
        enough = len(members) >= self.rules.min_nodes and settled
        if len(members) < self.rules.nodes and not enough:
            absent = sorted(set(range(1, self.rules.nodes + 1)) - newest.keys())
            return f"{here}; missing: task {', '.join(map(str, absent))}"
        if members[0].token != self.me.token:
            return f"{here}; {members[0]} is to begin"
        if blocked := self.gate.take():
            return f"{here}; {blocked}"
        proposal = {"members": [asdict(m) for m in members], "port": self.gate.port}
        if not self.folder.publish(f"{_name(number)}.json", _text(proposal)):
            self.gate.give_back()
        return f"{here}; generation {number} is proposed"

    def _out_of_patience(self, view: View, waiting: str) -> Agreed | Result:
        last = view.last
        if last is not None and self._bound == last.number:
            self.folder.publish(f"{_name(last.number)}.decision", f"abort\n{self.me} left\n")
            if (self.folder.read(f"{_name(last.number)}.decision") or "").startswith("go"):
                return Agreed(last)
        return Result(AGAIN, f"waited {self.rules.timeout:.0f} s to meet: {waiting}")

    # While the group works

    def watch(self, group: Generation) -> Result | None:
        """Once every heartbeat. A Result means: end your processes, then `conclude` with it.

        A member that ended well or saved (0, 99) is no reason: ours are about to do the same.
        """
        if self._lapsed():
            return self._lapse()
        view = self._look()
        if view.last is not None and view.last.number > group.number:
            return Result(AGAIN, f"generation {view.last.number} has taken over")
        for member, result in self._ended(view, group).items():
            if result is None:
                return Result(
                    AGAIN,
                    f"no sign of life of {member} for {self.rules.stale_after:.0f} s",
                    cause=False,
                )
            if result.code not in (0, AGAIN):
                return Result(result.code, f"{member}: {result.reason}", cause=False)
            if self._first_end is None:
                self._first_end = self._clock()
            elif self._clock() - self._first_end > 2 * self.rules.stale_after:
                return Result(AGAIN, f"{member} has ended, but not this node", cause=False)
        return None

    def conclude(self, group: Generation, own: Result) -> Result | None:
        """What the whole group ends with; None while others still have to say how they ended.

        Call only when our processes have ended. The answer is the same on every node that waits
        for it, whatever it saw first.
        """
        name = f"{_name(group.number)}.result.{self.me.token}"
        view = self._look()
        if name not in view.names:
            self.folder.write(name, _text(asdict(own)))
        if own.cause and own.code in (0, AGAIN, PERSON):
            return own
        ended = {**self._ended(view, group), self.me: own}
        return agree_on(ended) if len(ended) == len(group.members) else None

    def leave(self) -> None:
        """Be gone for the others at once, not only after `stale_after`."""
        self.gate.give_back()
        self.folder.remove(self.me.file)

    def _ended(self, view: View, group: Generation) -> dict[Member, Result | None]:
        """How members ended; None: died. Those that still run are not in it."""
        results: dict[Member, Result | None] = {}
        for member in group.members:
            name = f"{_name(group.number)}.result.{member.token}"
            if name in view.names and (text := self.folder.read(name)) is not None:
                results[member] = Result(**json.loads(text))
            elif not view.is_alive(group, member):
                results[member] = None
        return results

    # What can be seen

    def _lapsed(self) -> bool:
        return self._clock() - self._heard > self.rules.stale_after * 2 / 3

    def _lapse(self) -> Result:
        silent = self._clock() - self._heard
        return Result(AGAIN, f"{self.me} could give no sign of life for {silent:.0f} s")

    def _look(self) -> View:
        """A sign of life, then a fresh listing and who is fresh in it."""
        began = self._clock()
        now = self._touch()
        self._heard = began
        names = self.folder.names()
        fresh = []
        for name in names:
            if re.fullmatch(r"member_\d+_\w+\.json", name):
                time_of, text = self.folder.time_of(name), self.folder.read(name)
                if time_of is None or text is None or now - time_of > self.rules.stale_after:
                    continue
                member = Member(**json.loads(text))
                if member.joined:
                    fresh.append(member)
        return View(now, set(names), tuple(fresh), self._last_generation(names))

    def _touch(self) -> float:
        try:
            return self.folder.touch(self.me.file)
        except FileNotFoundError:  # someone tidied up
            self.folder.write(self.me.file, _text(asdict(self.me)))
            return self.folder.touch(self.me.file)

    def _last_generation(self, names: list[str]) -> Generation | None:
        found = [
            int(m[1]) for name in names if (m := re.fullmatch(r"generation_(\d+)\.json", name))
        ]
        if not found:
            return None
        proposal = json.loads(self.folder.read(f"{_name(max(found))}.json") or "")
        members = tuple(Member(**member) for member in proposal["members"])
        return Generation(max(found), members, proposal["port"])


@dataclass(frozen=True)
class View:
    """The folder at one time."""

    now: float
    names: set[str]
    fresh: tuple[Member, ...]
    last: Generation | None

    def is_alive(self, group: Generation, member: Member) -> bool:
        """Fresh, and its processes have not ended."""
        ended = f"{_name(group.number)}.result.{member.token}" in self.names
        return not ended and member.token in {m.token for m in self.fresh}

    def alive(self, group: Generation) -> bool:
        return any(self.is_alive(group, member) for member in group.members)


def _age(member: Member) -> tuple[float, str]:
    return member.joined, member.token


def _name(number: int) -> str:
    return f"generation_{number:06d}"


def _text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"

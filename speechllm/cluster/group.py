"""Who works together, and how it ended: values that nodes exchange, and the exit code they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AGAIN, PERSON = 99, 100  # what Grid Engine makes of exit codes: requeue; error state


@dataclass(frozen=True)
class Member:
    """One start of one node. joined: when, by the server's clock."""

    task: int
    token: str
    host: str
    address: str
    joined: float = 0.0

    @property
    def file(self) -> str:
        return f"member_{self.task}_{self.token}.json"

    def __str__(self) -> str:
        return f"task {self.task} on {self.host}"


@dataclass(frozen=True)
class Generation:
    number: int
    members: tuple[Member, ...]
    port: int

    @property
    def master(self) -> Member:
        return self.members[0]

    def rank_of(self, member: Member) -> int:
        return [m.token for m in self.members].index(member.token)


@dataclass(frozen=True)
class Result:
    """How a node ended. cause: by itself; else it only followed another one's end."""

    code: int
    reason: str
    cause: bool = True


def agree_on(results: Mapping[Member, Result | None]) -> Result:
    """One end out of those of all members (None: died); where several fit, the lowest task's."""
    named = sorted(results.items(), key=lambda item: item[0].task)
    for member, result in named:
        if result is not None and result.code == PERSON:
            return Result(PERSON, f"{member}: {result.reason}")
    for member, result in named:
        if result is None:
            return Result(AGAIN, f"{member} died")
    ended = [(m, r) for m, r in named if r is not None]
    ranked = sorted(ended, key=lambda item: (item[1].code != AGAIN, not item[1].cause))
    for member, result in ranked:
        if result.code != 0:
            return Result(result.code, f"{member}: {result.reason}")
    return Result(0, "done")

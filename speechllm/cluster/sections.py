"""The sections of a site profile; their descriptions are the profile reference."""

from __future__ import annotations

import os
import re
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Tag, model_validator

from speechllm.config.section import Section, as_list, kind_tag

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_UNITS |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_memory(text: str) -> int:
    """Bytes of Grid Engine's notation: 20G is 20 * 2**30, 20g is 20 * 10**9. Raises ValueError.

    >>> parse_memory("1.5K")
    1536
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTkmgt]?)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write it like 64G or 500M")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_seconds(value: Any) -> float:
    """Seconds of 90, 1:30 or 24:00:00. Raises ValueError."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", str(value))
    if match is None:
        raise ValueError(f"{value!r} is no time; write seconds, or hours:minutes:seconds")
    hours, minutes, seconds = match.groups(default="0")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _name(text: str) -> str:
    if re.fullmatch(r"[^\s,=]+", text) is None:
        raise ValueError(f"{text!r} is no name: it has blanks, commas or =, or is empty")
    return text


def _letter(text: str) -> str:
    if re.fullmatch(r"[a-zA-Z]", text) is None:
        raise ValueError(f"{text!r} is no letter of ulimit, as in n: 4096")
    return text


def node_mode(text: str) -> str:
    if re.fullmatch(r"array|pe:[^\s,=]+", text) is None:
        raise ValueError(f"{text!r} is neither array nor pe:NAME")
    return text


def absolute(path: str) -> str:
    if not os.path.isabs(path):
        raise ValueError(f"{path!r} is no absolute path")
    return path


def _memory(text: str) -> str:
    parse_memory(text)
    return text


Memory = Annotated[str, AfterValidator(_memory)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]
# Names go into comma-separated lists and `-l name=value` requests, so they hold neither.
Name = Annotated[str, AfterValidator(_name)]
Letter = Annotated[str, AfterValidator(_letter)]
Names = Annotated[tuple[Name, ...], BeforeValidator(as_list)]
AbsolutePath = Annotated[str, AfterValidator(expanduser), AfterValidator(absolute)]
Per = Literal["slot", "job"]

_PER = (
    "`slot`: the batch system counts the request for each slot, so the amount of a host is divided "
    "by the host's slots; `job`: it is asked for as it is."
)


class Gpus(Section):
    name: Name = Field("gpu", description="Name of the resource.")
    per: Per = Field("slot", description=_PER)


class GpuMemory(Section):
    names: Names = Field(description="Names of the resource.")
    amount: Memory = Field(description="Memory that each GPU must have, as in 20G.")


class Ram(Section):
    names: Names = Field(description="Names of the resource; each is asked for.")
    amount: Memory = Field(description="Memory of the whole job on one host, as in 64G.")
    per: Per = Field("slot", description=_PER)


class Storage(Section):
    tokens: dict[Name, Annotated[float, Field(gt=0)]] = Field(
        description="Tokens of storage servers that a job on one host takes, as in scratch: 0.5."
    )
    per: Per = Field("slot", description=_PER)


class Cpus(Section):
    pe: Name | None = Field(
        None,
        description="Parallel environment that gives several slots on one host; none: a job of "
        "one host takes one slot.",
    )
    slots: int = Field(1, ge=1, description="Slots of one host's share of a job.")


class Time(Section):
    soft: Name | None = Field(
        None,
        description="Name of the soft limit, as in s_rt; asked for at limit less half the margin.",
    )
    hard: Name | None = Field(None, description="Name of the hard limit, as in h_rt.")
    limit: Seconds | None = Field(
        None,
        description="Time that a job has, asked for under these names. Where the queue has a "
        "limit of its own, give it here without the names. Slurm: --time, with or without.",
    )
    margin: Seconds = Field(
        600,
        description="Before the limit a run finishes its step, saves and leaves; so much sooner.",
    )

    @model_validator(mode="after")
    def _limit_fits(self) -> Time:
        if self.limit is None and (self.soft or self.hard):
            raise ValueError("soft and hard are names of limits; give `limit` as well")
        if self.limit is not None and self.limit <= self.margin:
            raise ValueError(f"limit {self.limit:g} s is not above margin {self.margin:g} s")
        return self


class Array(Section):
    task_limit: int | None = Field(None, ge=1, description="Most tasks of one array job.")
    max_running: int | None = Field(
        None, ge=1, description="Most tasks of an array that run at a time (-tc); none: no bound."
    )


class Meeting(Section):
    """How the tasks of one run find each other through the shared folder."""

    timeout: Seconds = Field(
        900,
        gt=0,
        description="A node that has waited so long for the others leaves and lines up again.",
    )
    heartbeat: Seconds = Field(5, gt=0, description="Seconds between signs of life of a node.")
    stale_after: Seconds = Field(
        60,
        description="A node whose last sign of life is older is taken for dead; by the clock of "
        "the file server.",
    )
    attempts: int = Field(
        5, ge=1, description="Attempts without a new checkpoint before a person is asked (100)."
    )

    @model_validator(mode="after")
    def _beats_before_stale(self) -> Meeting:
        if self.stale_after < 3 * self.heartbeat:
            raise ValueError("stale_after must be at least three times heartbeat")
        return self


class CommandClaim(Section):
    kind: Literal["command"] = Field(
        "command", description="A tool of the site prints the devices that are free."
    )
    command: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="The tool and its arguments, as a list; {count} is the number of GPUs. It "
        "prints device numbers with commas, as for CUDA_VISIBLE_DEVICES."
    )


class SafeGpuClaim(Section):
    kind: Literal["safe_gpu"] = Field("safe_gpu", description="The Python package safe_gpu.")


class LocksClaim(Section):
    kind: Literal["locks"] = Field("locks", description="One lock file for each device of a host.")
    folder: AbsolutePath = Field(
        "/tmp/speechllm-gpus", description="A folder on the host's own disk, never a shared one."
    )
    devices: int | None = Field(
        None, ge=1, description="Devices of each host; none: as many as nvidia-smi lists."
    )


class SchedulerClaim(Section):
    kind: Literal["scheduler"] = Field(
        "scheduler", description="The batch system itself sets a variable with the devices."
    )
    variable: Name = Field("CUDA_VISIBLE_DEVICES", description="That variable.")


class NoClaim(Section):
    kind: Literal["none"] = Field("none", description="Nothing is claimed: hosts without GPUs.")


Claim = Annotated[
    Annotated[NoClaim, Tag("none")]
    | Annotated[CommandClaim, Tag("command")]
    | Annotated[SafeGpuClaim, Tag("safe_gpu")]
    | Annotated[LocksClaim, Tag("locks")]
    | Annotated[SchedulerClaim, Tag("scheduler")],
    kind_tag("none"),
]


def port_range(value: tuple[int, int]) -> tuple[int, int]:
    low, high = value
    if not 1024 <= low < high <= 65535:
        raise ValueError("expected [LOW, HIGH] with 1024 <= LOW < HIGH <= 65535")
    return value

"""What a Grid Engine site's own configuration says about a profile: pure, over qconf's facts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from speechllm.cluster.profile import SiteProfile
from speechllm.cluster.sections import parse_seconds

Level = Literal["ok", "warning", "wrong"]
Facts = Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """wrong: jobs of this profile will not work; warning: a trap that one should know of."""

    level: Level
    text: str


@dataclass(frozen=True)
class SiteFacts:
    """qconf's answers by name: configuration (-sconf), scheduler (-ssconf), queues (-sq), parallel
    and checkpointing environments (-sp, -sckpt), complexes (-sc). An object that does not exist has
    no facts."""

    configuration: Facts
    scheduler: Facts
    queues: Mapping[str, Facts]
    pes: Mapping[str, Facts]
    checkpoints: Mapping[str, Facts]
    complexes: Mapping[str, Facts] = field(default_factory=dict)


def findings(site: SiteProfile, facts: SiteFacts, python: str) -> list[Finding]:
    """Everything there is to say, the good as well. python: the interpreter of the jobs."""
    return [
        *_queues(site, facts),
        *_resources(site, facts),
        *_environments(site, facts),
        *_warnings(site, facts),
        *_times(site, facts),
        *_restarts(site, facts),
        *_arrays(site, facts),
        *_python(python),
    ]


def queue_name(queue: str) -> str:
    """long.q of long.q@@gpu and of long.q@host."""
    return queue.partition("@")[0]


def words(value: str) -> list[str]:
    """Names of a list in a queue, host-specific parts (`[@hosts=...]`) included."""
    return [word for word in re.split(r"[\s,\[\]=]+", value) if word]


def limit_of(value: str) -> float | None:
    """Seconds; None for INFINITY. Of a list with host-specific values, the smallest."""
    times = [word for word in words(value) if re.fullmatch(r"[\d:]+", word)]
    return min(map(parse_seconds, times)) if times else None


def params(value: str) -> dict[str, str]:
    """`A=1,B=2` of qmaster_params and the like, keys in capitals."""
    parts = (word.partition("=") for word in re.split(r"[\s,]+", value))
    return {key.upper(): setting or "1" for key, _, setting in parts if key}


def _queues(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    for queue in site.queue:
        if facts.queues.get(queue_name(queue)):
            yield Finding("ok", f"queue {queue_name(queue)} exists")
        else:
            yield Finding("wrong", f"there is no queue {queue_name(queue)} (qconf -sql lists them)")


def _resources(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    wanted: list[tuple[str, str | None]] = [(name, None) for name in site.requests]
    if site.gpus:
        wanted.append((site.gpus.name, site.gpus.per))
    if site.gpu_memory:
        wanted += [(name, None) for name in site.gpu_memory.names]
    if site.ram:
        wanted += [(name, site.ram.per) for name in site.ram.names]
    if site.storage:
        wanted += [(name, site.storage.per) for name in site.storage.tokens]
    wanted += [(name, None) for name in (site.time.soft, site.time.hard) if name]
    for name, per in wanted:
        row = facts.complexes.get(name)
        if row is None:
            yield Finding("wrong", f"there is no resource {name} (qconf -sc lists them)")
        elif row["requestable"] == "NO":
            yield Finding("wrong", f"resource {name} cannot be asked for (requestable NO)")
        elif per == "job" and row["consumable"] == "YES":
            yield Finding(
                "wrong",
                f"resource {name} is counted for each slot (consumable YES), but the profile asks "
                "per job: a job of several slots takes it several times; write per: slot",
            )
        elif per == "slot" and row["consumable"] != "YES" and site.cpus.slots > 1:
            yield Finding(
                "wrong",
                f"resource {name} is not counted for each slot (consumable {row['consumable']}), "
                "but the profile divides it by the slots; write per: job",
            )
        else:
            yield Finding("ok", f"resource {name} fits")


def _environments(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    for name in {site.cpus.pe, site.pe} - {None}:
        pe = facts.pes.get(str(name))
        if not pe:
            yield Finding("wrong", f"there is no parallel environment {name} (qconf -spl)")
            continue
        for queue in site.queue:
            known = words(facts.queues.get(queue_name(queue), {}).get("pe_list", ""))
            if known and name not in known:
                yield Finding("wrong", f"queue {queue} does not offer parallel environment {name}")
        rule = pe.get("allocation_rule", "")
        if name == site.cpus.pe and name != site.pe and rule != "$pe_slots":
            yield Finding(
                "wrong",
                f"parallel environment {name} may spread slots over hosts (allocation_rule "
                f"{rule}); cpus.pe needs $pe_slots",
            )
        if name == site.pe and rule != str(site.cpus.slots):
            level: Level = "wrong" if rule.isdigit() or rule == "$pe_slots" else "warning"
            yield Finding(
                level,
                f"parallel environment {name} has allocation_rule {rule}, the profile wants "
                f"{site.cpus.slots} slots on each host (cpus.slots): a job may get fewer hosts",
            )
        if name == site.pe and pe.get("control_slaves", "").upper() != "TRUE":
            yield Finding(
                "wrong",
                f"parallel environment {name} has control_slaves FALSE: nothing can be started on "
                "the other hosts (qrsh -inherit); use multi_node: array",
            )


def _warnings(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    settings = params(facts.configuration.get("execd_params", ""))
    for name in ("NOTIFY_KILL", "NOTIFY_SUSP"):
        if settings.get(name, "").lower() == "none":
            yield Finding(
                "warning", f"execd_params {name}=none: no warning before a kill or suspension"
            )
    for queue in site.queue:
        known = facts.queues.get(queue_name(queue), {})
        notify = limit_of(known.get("notify", ""))
        if site.notify_seconds and notify is not None and notify < site.notify_seconds:
            yield Finding(
                "warning",
                f"queue {queue} kills {notify:g} s after its warning, the profile counts on "
                f"{site.notify_seconds:g} s (notify_seconds)",
            )
        for method in ("terminate_method", "suspend_method"):
            if known.get(method, "NONE").upper() != "NONE":
                yield Finding(
                    "warning",
                    f"queue {queue} has a {method} of its own ({known[method]}): see that it "
                    "signals every process and leaves time for saving",
                )


def _times(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    for queue in site.queue:
        known = facts.queues.get(queue_name(queue), {})
        for name in ("s_rt", "h_rt"):
            limit = limit_of(known.get(name, ""))
            if limit is None:
                continue
            if site.time.limit is None:
                yield Finding(
                    "wrong" if name == "h_rt" else "warning",
                    f"queue {queue} has {name} {limit:g} s, but the profile no time.limit: jobs "
                    f"do not save in time; write time.limit: {known[name]}",
                )
            elif limit < site.time.limit - (site.time.margin / 2 if name == "s_rt" else 0):
                yield Finding(
                    "wrong",
                    f"queue {queue} has {name} {limit:g} s, less than the profile's time.limit "
                    f"{site.time.limit:g} s",
                )


def _restarts(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    master = params(facts.configuration.get("qmaster_params", ""))
    if master.get("FORBID_RESCHEDULE", "0").lower() in ("1", "true"):
        yield Finding(
            "warning",
            "the site does not start a job again that ends with 99 (FORBID_RESCHEDULE): submit "
            "with --chain, or again by hand",
        )
    if master.get("FORBID_APPERROR", "0").lower() in ("1", "true"):
        yield Finding(
            "warning",
            "a job that ends with 100 leaves the queue (FORBID_APPERROR): look at status, held "
            "jobs will start after it",
        )
    unknown = limit_of(facts.configuration.get("reschedule_unknown", ""))
    if not unknown:
        yield Finding(
            "warning",
            "jobs of a dead host stay in the queue as running (reschedule_unknown 0): the other "
            "nodes wait; start the job again with qmod -rj, or submit with --min-nodes",
        )
    if site.checkpoint:
        if not facts.checkpoints.get(site.checkpoint):
            yield Finding("wrong", f"there is no checkpointing environment {site.checkpoint}")
        for queue in site.queue:
            known = words(facts.queues.get(queue_name(queue), {}).get("ckpt_list", ""))
            if site.checkpoint not in known:
                yield Finding("wrong", f"queue {queue} does not offer {site.checkpoint}")
    if facts.scheduler.get("schedd_job_info", "true").lower() == "false":
        yield Finding(
            "warning", "the scheduler does not say why a job waits (schedd_job_info false)"
        )


def _arrays(site: SiteProfile, facts: SiteFacts) -> Iterator[Finding]:
    tasks = int(facts.configuration.get("max_aj_tasks", "0") or 0)
    if tasks and site.array.task_limit and site.array.task_limit > tasks:
        yield Finding("wrong", f"arrays have at most {tasks} tasks; lower array.task_limit to that")
    instances = int(facts.configuration.get("max_aj_instances", "0") or 0)
    if instances and site.multi_node == "array":
        yield Finding("ok", f"at most {instances} tasks of an array run at a time: nodes of a job")


def _python(python: str) -> Iterator[Finding]:
    """Of the folders on the way, who is neither their owner nor root may enter only open ones."""
    for folder in reversed(Path(python).resolve().parents):
        if folder.is_dir():
            facts = folder.stat()
            if not facts.st_mode & 0o011 and facts.st_uid != os.getuid():
                yield Finding(
                    "wrong",
                    f"the interpreter {python} lies in {folder}, which you cannot enter: jobs will "
                    "not start",
                )
                return

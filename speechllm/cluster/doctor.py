"""speechllm-submit doctor: does a profile fit its site, and do two hosts find each other?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from speechllm.cluster.batch import Batch
from speechllm.cluster.gridengine import GridEngine
from speechllm.cluster.job import Job
from speechllm.cluster.manage import log_files
from speechllm.cluster.options import add_site_options, gpus_of, make_job, site_of
from speechllm.cluster.profile import SiteProfile
from speechllm.cluster.submission import batch_of, submit_job
from speechllm.cluster.traps import Finding, SiteFacts, findings, queue_name
from speechllm.log import terminal

STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor", help="compare a profile with its site, and let two hosts add numbers"
    )
    add_site_options(parser)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="of the test job")
    parser.add_argument(
        "--dir", default="exp/doctor", help="run directory of the test job (default: exp/doctor)"
    )
    parser.add_argument("--no-job", action="store_true", help="only read, submit no test job")
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="for the test job"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    site = site_of(options)
    batch = batch_of(site)
    found = []
    if isinstance(batch, GridEngine):
        found += findings(site, site_facts(site, batch), site.python or sys.executable)
    if not options.no_job and not any(one.level == "wrong" for one in found):
        found.append(probe(probe_job(options, site), batch, options.wait))
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        console = terminal()
        for one in found:
            line = Text(f"{one.level:<8} ", STYLES[one.level]) + Text(one.text)
            console.print(line, soft_wrap=True)
    return 1 if any(one.level == "wrong" for one in found) else 0


def site_facts(site: SiteProfile, batch: GridEngine) -> SiteFacts:
    queues = {queue_name(queue) for queue in site.queue}
    pes = {name for name in (site.cpus.pe, site.pe) if name}
    return SiteFacts(
        configuration=batch.facts("-sconf"),
        scheduler=batch.facts("-ssconf"),
        queues={name: batch.facts("-sq", name) for name in queues},
        pes={name: batch.facts("-sp", name) for name in pes},
        checkpoints={site.checkpoint: batch.facts("-sckpt", site.checkpoint)}
        if site.checkpoint
        else {},
        complexes=batch.complexes(),
    )


def probe_job(options: argparse.Namespace, site: SiteProfile) -> Job:
    """Two nodes that meet, join in a process group and add their numbers."""
    run_dir = os.path.abspath(options.dir)
    gpus = gpus_of(options, site)
    return make_job(
        site,
        name="doctor",
        kind="probe",
        run_dir=run_dir,
        arguments=("-m", "speechllm.cluster.allreduce", str(Path(run_dir, "sum.json"))),
        nodes=2,
        min_nodes=2,
        mode="pe" if site.pe else "array",
        gpus_per_node=gpus,
        procs_per_node=max(1, gpus),
    )


def probe(
    job: Job,
    batch: Batch,
    wait: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Finding:
    """Submit the test job and wait for its sum; it is taken out of the queue when time is up."""
    result = Path(job.run_dir, "sum.json")
    result.unlink(missing_ok=True)
    submission = submit_job(job, batch)
    ids = submission.job_ids
    began, submitted = clock(), time.time()
    queued = {task.job_id: task.code for task in batch.queued() if task.job_id in ids}
    while queued and clock() - began < wait and "E" not in "".join(queued.values()):
        sleep(1.0)
        queued = {task.job_id: task.code for task in batch.queued() if task.job_id in ids}
    waited = clock() - began
    if queued:
        why = "; ".join(batch.why_pending(ids[-1])[:3])
        batch.delete(ids)
        state = ", ".join(queued.values())
        return Finding("wrong", f"the test job is {state} after {waited:.0f} s: {why}")
    if not result.is_file():
        return Finding("wrong", f"the test job failed; its logs are {_logs(job, submitted)}")
    said: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    size = said["size"]
    if size != 2 * job.procs_per_node or said["sum"] != size * (size - 1) / 2:
        return Finding("wrong", f"the test job added wrongly: {said}")
    hosts = " and ".join(dict.fromkeys(said["hosts"]))
    return Finding(
        "ok", f"{size} processes on {hosts} added their numbers in {said['seconds']} s "
        f"({said['device']}), {waited:.0f} s after it was submitted",
    )  # fmt: skip


def _logs(job: Job, since: float) -> str:
    new = [file for file in log_files(job.logs, None) if file.stat().st_mtime >= since - 5]
    return " ".join(map(str, new)) or f"missing in {job.logs}: do the hosts see that folder?"

"""What the submitting commands share: their options, and showing what was submitted."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from speechllm.cluster.batch import BatchError
from speechllm.cluster.job import Job
from speechllm.cluster.profile import SiteProfile, load_profile, site_names
from speechllm.cluster.render import job_script, submit_arguments
from speechllm.cluster.submission import (
    REPOSITORY,
    Submission,
    batch_of,
    program_of,
    refuse_double,
    revision_of,
    submit_job,
)
from speechllm.errors import ConfigError
from speechllm.log import terminal

SITE_VARIABLE = "SPEECHLLM_SITE"


def add_site_options(parser: argparse.ArgumentParser) -> None:
    known = os.environ.get(SITE_VARIABLE)
    parser.add_argument(
        "--site", default=known, required=known is None, metavar="S",
        help=f"profile: {', '.join(site_names())}, or a YAML file (default: ${SITE_VARIABLE})",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="changes", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the profile, as in ram.amount=32G; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--time", metavar="H:MM:SS", help="time limit; the same as --with time.limit=H:MM:SS"
    )


def add_job_options(parser: argparse.ArgumentParser) -> None:
    add_site_options(parser)
    parser.add_argument("--name", help="of the job and its folder RUN/cluster/NAME")
    parser.add_argument(
        "--hold", type=_job, action="append", default=[], metavar="JOB",
        help="wait for the end of this job",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print script and arguments, submit nothing"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def _job(text: str) -> str:
    """Of --hold; what is empty comes from a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no job")
    return text


def site_of(options: argparse.Namespace) -> SiteProfile:
    changes = [*options.changes, *([f"time.limit={options.time}"] if options.time else [])]
    return load_profile(options.site, changes)


def gpus_of(options: argparse.Namespace, site: SiteProfile) -> int:
    """GPUs of a host: as asked for; else one, or none where the site claims none."""
    usual = 0 if site.gpu_claim.kind == "none" else 1
    gpus: int = usual if options.gpus_per_node is None else options.gpus_per_node
    if gpus < 0:
        raise ConfigError("--gpus-per-node must be 0 or more")
    return gpus


def processes_of(options: argparse.Namespace, site: SiteProfile) -> dict[str, int]:
    """GPUs and processes of a host, as fields of a job: a process for each GPU, else one."""
    gpus = gpus_of(options, site)
    processes = max(1, gpus) if options.procs_per_node is None else options.procs_per_node
    if processes < 1:
        raise ConfigError("--procs-per-node must be 1 or more")
    return {"gpus_per_node": gpus, "procs_per_node": processes}


def make_job(site: SiteProfile, **fields: Any) -> Job:
    """A job submitted from here, with what is the same for all kinds filled in."""
    return Job(
        site=site,
        directory=os.getcwd(),
        python=site.python or sys.executable,
        repository=str(REPOSITORY),
        revision=revision_of(REPOSITORY),
        time_limit=site.time.limit,
        **{"max_attempts": site.meeting.attempts, **fields},
    )


def job_name(text: str) -> str:
    """A directory's or file's name as a job's: queues take letters first and no odd characters."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    return name if re.match(r"[A-Za-z_]", name) else f"run_{name}"


def checked_name(options: argparse.Namespace, usual: str) -> str:
    """--name where given. Raises ConfigError where a queue would not take it."""
    name: str = options.name or job_name(usual)
    if job_name(name) != name:
        raise ConfigError(f"--name {name}: use letters, digits and _ . -, with a letter first")
    return name


def refuse_unshared(run_dir: str, site: SiteProfile) -> None:
    """Raise ConfigError where the hosts would not see the run directory."""
    folders = [Path(folder).resolve() for folder in site.shared]
    if folders and not any(Path(run_dir).resolve().is_relative_to(each) for each in folders):
        raise ConfigError(
            f"{run_dir} is in none of the folders that all hosts see "
            f"({', '.join(map(str, folders))}); choose a run_dir there"
        )


def require_data(key: str, pattern: str, options: argparse.Namespace) -> None:
    """Raise ConfigError where a directory or pattern finds nothing here; what is elsewhere, or made
    by a job that is waited for, cannot be looked for."""
    elsewhere = any(sign in pattern for sign in ("://", "::", "{"))
    found = glob.glob(pattern, recursive=True) or os.path.exists(pattern)
    if not (options.hold or elsewhere or found):
        raise ConfigError(f"{key}: {pattern}: no such directory or files here")


def submit_all(
    jobs: Sequence[Job],
    options: argparse.Namespace,
    *,
    chain: int = 1,
    files: Mapping[str, str] | None = None,
) -> list[Submission]:
    """Submit jobs of which each waits for the one before; show them, or only what would be done.

    files: further ones for their folders, name -> text.
    """
    for job in jobs:
        refuse_unshared(job.run_dir, job.site)
    if options.dry_run:
        _show_dry(jobs, options, chain)
        return []
    batch = batch_of(jobs[0].site)
    # Before any is submitted: the jobs before a refused one would be left in the queue.
    for job in jobs:
        submit_arguments(job)
        refuse_double(job, batch)
    done: list[Submission] = []
    for job in jobs:
        hold = done[-1].job_ids[-1:] if done else options.hold
        try:
            done.append(submit_job(job, batch, hold=hold, chain=chain, files=files))
        except BatchError as error:
            left = [f"{one.name} ({', '.join(one.job_ids)})" for one in done]
            note = f"; in the queue already: {', '.join(left)}" if left else ""
            raise type(error)(f"{error}{note}") from None
    if options.json:
        print(json.dumps([asdict(one) for one in done], indent=1))
    else:
        _show(done, jobs)
    return done


def _show(done: Sequence[Submission], jobs: Sequence[Job]) -> None:
    console = terminal()
    table = Table("job", "id", "kind", "size")
    for one, job in zip(done, jobs, strict=True):
        size = f"{job.nodes} hosts" if job.nodes > 1 else f"{max(1, job.tasks)} tasks"
        table.add_row(one.name, ", ".join(one.job_ids), one.kind, size)
    console.print(table)
    for one in done:
        console.print(f"script, profile and logs: {one.folder}", soft_wrap=True)
    console.print(f"revision: {jobs[0].revision or 'unknown'}", soft_wrap=True)
    console.print(f"speechllm-submit status {jobs[0].run_dir}", style="green", soft_wrap=True)


def _show_dry(jobs: Sequence[Job], options: argparse.Namespace, chain: int) -> None:
    shown = []
    for number, job in enumerate(jobs):
        hold = ["ID_OF_THE_JOB_BEFORE"] if number else options.hold
        command = [program_of(job.site), *submit_arguments(job, hold)]
        shown.append({"folder": str(job.folder), "script": job_script(job), "command": command})
    if options.json:
        print(json.dumps({"jobs": shown, "chain": chain}, indent=1))
        return
    for each in shown:
        print(f"# {each['folder']}/script.sh\n{each['script']}")
        print("# submitted as, one argument a line:", *each["command"], "", sep="\n")
    if chain > 1:
        print(f"# {chain} times, each held on the one before")

"""A job -> its script, and the argument list that submits it. Pure; nothing is quoted.

The script holds the same options as directives, so that `qsub script.sh` by hand does the same. The
list that we submit switches the directives off, so that each option has one source.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from speechllm.cluster.job import Job
from speechllm.cluster.requests import clock, ram_requests, resource_requests, slots_per_host
from speechllm.errors import ConfigError

# Grid Engine takes commas, colons, dollars and white space in paths for syntax of its own.
_PLAIN = re.compile(r"[A-Za-z0-9_./+@%=~^-]+")


def options_of(job: Job) -> list[tuple[str, ...]]:
    """Options of one submission without what it waits for; each is (option, values...).

    Raises ConfigError where the site cannot give what the job wants.
    """
    for path in (job.run_dir, job.directory):
        if not _PLAIN.fullmatch(path):
            raise ConfigError(
                f"{path}: a batch system reads paths by rules of its own; use only letters, "
                "digits and _ . / + @ % = ~ ^ -"
            )
    limit = job.site.array.task_limit
    if limit is not None and job.tasks > limit:
        raise ConfigError(f"{job.tasks} tasks, but the site allows {limit} (array.task_limit)")
    return _slurm_options(job) if job.site.kind == "slurm" else _sge_options(job)


def submit_arguments(job: Job, hold: Sequence[str] = ()) -> list[str]:
    """What follows `qsub` or `sbatch`. hold: ids of jobs (Grid Engine: or names) to wait for."""
    words = [word for option in options_of(job) for word in option]
    if job.site.kind == "slurm":
        waits = [f"--dependency=afterany:{':'.join(hold)}"] if hold else []
        return ["--parsable", *words, *waits, str(job.script)]
    waits = ["-hold_jid", ",".join(hold)] if hold else []
    return ["-terse", "-w", "e", "-C", "", *words, *waits, str(job.script)]


def job_script(job: Job) -> str:
    """The text of script.sh."""
    slurm = job.site.kind == "slurm"
    prefix, program = ("#SBATCH", "sbatch") if slurm else ("#$", "qsub")
    lines = [
        "#!/bin/bash",
        *(f"{prefix} {' '.join(option)}" for option in options_of(job)),
        f"# Job {job.name}, written by speechllm-submit; by hand: {program} {job.script}",
        # Until Python has its handlers in place, seconds on a busy host and more where an
        # environment is activated, a signal would end the job.
        *([] if slurm else ["trap '' USR1 USR2 TERM"]),
        *(f"ulimit -{letter} {shlex.quote(value)}" for letter, value in job.site.ulimits.items()),
        *job.site.environment,
        f"export PYTHONPATH={shlex.quote(job.repository)}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    node = shlex.join([job.python, "-m", "speechllm.cluster.node", str(job.file)])
    lines += _slurm_ending(node) if slurm else [f"exec {node}"]
    return "\n".join(lines) + "\n"


def _sge_options(job: Job) -> list[tuple[str, ...]]:
    site = job.site
    log = "$JOB_NAME.$JOB_ID.$TASK_ID.log" if job.tasks else "$JOB_NAME.$JOB_ID.log"
    options: list[tuple[str, ...]] = [
        ("-N", job.name),
        ("-S", "/bin/bash"),
        ("-wd", job.directory),
        ("-j", "y"),
        ("-o", str(job.logs / log)),
    ]
    if site.queue:
        options.append(("-q", ",".join(site.queue)))
    if site.project:
        options.append(("-P", site.project))
    if requests := resource_requests(job):
        options.append(("-l", ",".join(f"{name}={value}" for name, value in requests.items())))
    if job.mode == "pe":
        assert site.pe is not None
        options.append(("-pe", site.pe, str(job.nodes * slots_per_host(job))))
    elif site.cpus.pe and site.cpus.slots > 1:
        options.append(("-pe", site.cpus.pe, str(site.cpus.slots)))
    if job.tasks:
        options.append(("-t", f"1-{job.tasks}"))
    if bound := _running_bound(job):
        options.append(("-tc", str(bound)))
    if site.notify_seconds is not None:
        options.append(("-notify",))
    options.append(("-r", "y" if site.rerun else "n"))
    if site.checkpoint:
        options.append(("-ckpt", site.checkpoint))
    return options


def _running_bound(job: Job) -> int | None:
    """-tc, for tasks that work by themselves: nodes of one group would wait for each other."""
    return job.site.array.max_running if job.variants else None


def _slurm_options(job: Job) -> list[tuple[str, ...]]:
    site = job.site
    log = "%x.%A.%a.log" if job.tasks else "%x.%j.log"
    words = [
        f"--job-name={job.name}",
        f"--chdir={job.directory}",
        f"--output={Path(job.logs, log)}",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={site.cpus.slots}",
    ]
    if site.queue:
        words.append(f"--partition={','.join(site.queue)}")
    if site.project:
        words.append(f"--account={site.project}")
    words += [f"--{name}={value}" for name, value in site.requests.items()]
    if job.gpus_per_node and site.gpus is not None:
        words.append(f"--gres={site.gpus.name}:{job.gpus_per_node}")
    words += [f"--{name}={value}" for name, value in ram_requests(job).items()]
    if job.time_limit is not None:
        words.append(f"--time={clock(job.time_limit)}")
    if site.notify_seconds is not None:
        words.append(f"--signal=B:USR1@{round(site.notify_seconds)}")
    words.append("--requeue" if site.rerun else "--no-requeue")
    if job.tasks:
        bound = _running_bound(job)
        words.append(f"--array=1-{job.tasks}" + (f"%{bound}" if bound else ""))
    return [(word,) for word in words]


def _slurm_ending(node: str) -> list[str]:
    """Slurm does not know that 99 means "again", and signals only the script itself."""
    return [
        "export JOB_ID=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}",
        "export SGE_TASK_ID=${SLURM_ARRAY_TASK_ID:-undefined} RESTARTED=${SLURM_RESTART_COUNT:-0}",
        f"{node} &",
        "node=$!",
        "trap 'kill -USR1 \"$node\"' USR1",
        "trap 'kill -TERM \"$node\"' TERM",
        "for again in 1 2 3 4 5 6 7 8; do  # a signal ends `wait` before the program has ended",
        '  wait "$node"',
        "  code=$?",
        '  [ "$code" -le 128 ] && break',
        "done",
        '[ "$code" = 99 ] && scontrol requeue "$SLURM_JOB_ID"',
        'exit "$code"',
    ]

"""speechllm-submit status: where jobs stand, from the queue and the files that they leave."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from speechllm.cluster.batch import Batch, QueuedTask
from speechllm.cluster.job import Job, read_job
from speechllm.cluster.requests import clock
from speechllm.cluster.submission import Submission, batch_of, find_submissions
from speechllm.log import terminal
from speechllm.report.status import read_status

# What the exit codes of a job mean; everything else is `failed`.
PERSON = 100
ENDS = {0: "done", 99: "saved", PERSON: "needs you"}
STYLES = {
    "running": "green", "done": "bold green", "pending": "yellow", "held": "yellow",
    "saved": "cyan", "cancelled": "cyan", "suspended": "magenta", "deleting": "magenta",
    "error": "bold red", "failed": "bold red", "needs you": "bold red",
}  # fmt: skip
# None: nothing that it left says how it ended.
_WORST_FIRST = ("needs you", "failed", None, "saved", "done")
_URGENT = ("error", "running", "suspended", "deleting", "pending", "held")


@dataclass(frozen=True)
class Row:
    """One job, or one task of an array whose tasks have run directories of their own.

    state: of the queue, else how it ended. tasks: by state in the queue. attempts: starts of the
    whole job so far. last_line_seconds: age of the newest log.
    """

    job: str
    kind: str
    ids: list[str]
    run_dir: str
    state: str
    tasks: dict[str, int]
    hosts: list[str]
    attempts: int
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    utterances_per_second: float | None = None
    eta_seconds: float | None = None
    last_line_seconds: float | None = None
    reason: str = ""


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", help="where the jobs of a run stand")
    parser.add_argument("where", metavar="RUN|JOB", help="run directory, job id or job name")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(command=status)


def status(options: argparse.Namespace) -> int:
    rows = [row for one in find_submissions(options.where) for row in rows_of(one)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    console = terminal()
    console.print(table_of(rows))
    for row in rows:
        if row.reason:
            console.print(Text(f"{row.job}: {row.reason}", STYLES.get(row.state, "")))
    return 0


def rows_of(submission: Submission, batch: Batch | None = None) -> list[Row]:
    """The rows of one submission. batch: None asks the job's own."""
    job = read_job(Path(submission.folder) / "job.json")
    batch = batch or batch_of(job.site)
    own_runs = any(variant.run_dir for variant in job.variants)
    parts = parts_of(job)
    queue = batch.queued()
    if own_runs:
        return [_row(part, [part], submission, queue, batch) for part in parts]
    return [_row(job, parts, submission, queue, batch)]


def _row(
    job: Job,
    parts: Sequence[Job],
    submission: Submission,
    queue: Sequence[QueuedTask],
    batch: Batch,
) -> Row:
    """parts: what keeps records of its own, the job or each task of an array."""
    histories = [read_jsonl(part.attempts) for part in parts]
    ids = set(submission.job_ids) | started_ids(histories)
    tasks = [t for t in queue if t.job_id in ids and job.task in (None, t.task)]
    starts = [[one for one in history if one["event"] == "start"] for history in histories]
    lasts = [history[-1] if history else {} for history in histories]
    progress = (read_status(job.run) or {}) if job.kind == "train" else {}
    ends = {ended_state(last, progress) for last in lasts}
    state = queue_state(tasks) or next((end for end in _WORST_FIRST if end in ends), None)
    if not tasks and job.cancel.exists() and progress.get("state") != "done":
        state = "cancelled"
    reason = ""
    if not state:
        state, reason = _accounted(batch, submission.job_ids[-1], job.task)
    elif state == "error" and (asked := [one for one in lasts if one.get("code") == PERSON]):
        reason = "; ".join(dict.fromkeys(str(one["reason"]) for one in asked))
    elif state in ("pending", "error") and tasks:
        reason = "; ".join(batch.why_pending(tasks[0].job_id)[:3])
    else:
        bad = [last for last in lasts if last.get("event") == "end" and last["code"] != 0]
        reason = "; ".join(dict.fromkeys(str(last.get("reason", "")) for last in bad))
    hosts = {task.host for task in tasks if task.host}
    if not hosts:
        hosts = {host for history in starts if history for host in history[-1].get("hosts", [])}
    age = time.time() - float(progress.get("time", 0))
    # While a start loads, what stands there is of the one before, which has saved and left.
    eta = progress.get("eta_seconds") if progress.get("state") == "running" else None
    return Row(
        job=job.name if job.task is None else f"{job.name}.{job.task}",
        kind=job.kind,
        ids=list(submission.job_ids),
        run_dir=str(job.run),
        state=state,
        tasks=dict(Counter(task.state for task in tasks)),
        hosts=sorted(hosts),
        attempts=max(map(len, starts)),
        step=progress.get("step"),
        steps=progress.get("steps"),
        loss=progress.get("loss"),
        utterances_per_second=progress.get("utterances_per_second"),
        eta_seconds=max(0.0, eta - age) if eta is not None and state == "running" else None,
        last_line_seconds=newest_age(job.logs),
        reason=reason,
    )


def parts_of(job: Job) -> list[Job]:
    """What keeps records of its own: each task of an array that works by itself, else the job."""
    return [job.for_task(number) for number in range(1, len(job.variants) + 1)] or [job]


def started_ids(histories: Iterable[Sequence[dict[str, Any]]]) -> set[str]:
    """Of the jobs in lists of attempts, also of those that were submitted by hand."""
    return {str(one["job_id"]) for history in histories for one in history if one.get("job_id")}


def queue_state(tasks: Sequence[QueuedTask]) -> str | None:
    """The most urgent state of the tasks; None where none is in the queue."""
    states = {task.state for task in tasks}
    return next((state for state in _URGENT if state in states), None)


def ended_state(last: dict[str, Any], progress: dict[str, Any]) -> str | None:
    """How a job that has left the queue ended, by its last attempt, else by its training."""
    if last.get("event") == "end":
        return ENDS.get(int(last["code"]), "failed")
    state = progress.get("state")
    return {"running": "failed"}.get(str(state), str(state)) if state else None


def _accounted(batch: Batch, job_id: str, task: int | None) -> tuple[str, str]:
    """(state, reason) by the batch system's own records."""
    codes = batch.exit_codes(job_id, task)
    if not codes:
        return "ended", "left the queue; the batch system has no record of its end (yet)"
    bad = [code for code in codes if code != 0]
    if not bad:
        return "done", ""
    return ENDS.get(bad[-1], "failed"), f"{len(bad)} of {len(codes)} tasks ended with {bad[-1]}"


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; what follows the last newline is still being written."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def newest_age(folder: Path) -> float | None:
    """Seconds since anything was written to a file of the folder."""
    times = [file.stat().st_mtime for file in folder.glob("*.log")]
    return max(0.0, time.time() - max(times)) if times else None


def table_of(rows: Iterable[Row]) -> Table:
    table = Table(
        *("job", "state", "tasks", "hosts", "attempts", "step", "loss", "utt/s", "ETA", "last line")
    )
    for row in rows:
        step = "-" if row.step is None else f"{row.step}/{row.steps}"
        tasks = ", ".join(f"{count} {state}" for state, count in row.tasks.items())
        table.add_row(
            Text(f"{row.job} ({', '.join(row.ids)})"),
            Text(row.state, STYLES.get(row.state, "")),
            tasks or "-",
            " ".join(row.hosts) or "-",
            str(row.attempts),
            step,
            "-" if row.loss is None else f"{row.loss:.3f}",
            "-" if row.utterances_per_second is None else f"{row.utterances_per_second:.1f}",
            "-" if row.eta_seconds is None else clock(row.eta_seconds),
            "-" if row.last_line_seconds is None else f"{clock(row.last_line_seconds)} ago",
        )
    return table

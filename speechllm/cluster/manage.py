"""speechllm-submit logs and cancel."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from speechllm.cluster.batch import Batch, QueuedTask
from speechllm.cluster.job import Job, read_job
from speechllm.cluster.status import parts_of, read_jsonl, started_ids
from speechllm.cluster.submission import Submission, batch_of, find_submissions
from speechllm.errors import UserError
from speechllm.report.status import read_status

LEAVING = 20.0  # seconds


def add_logs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("logs", help="what a job printed")
    parser.add_argument("where", metavar="RUN|JOB", help="run directory, job id or job name")
    parser.add_argument("--task", type=int, metavar="K", help="of an array (default: the newest)")
    parser.add_argument("-n", "--lines", type=int, default=40, help="last lines (default: 40)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.set_defaults(command=logs)


def add_cancel(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "cancel", help="let the jobs of a run save, then take them out of the queue"
    )
    parser.add_argument("where", metavar="RUN|JOB", help="run directory, job id or job name")
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="SECONDS", help="for saving (default: 300)"
    )
    parser.add_argument("--now", action="store_true", help="do not wait for saving")
    parser.set_defaults(command=cancel)


def logs(options: argparse.Namespace) -> int:
    files = [
        file
        for one in find_submissions(options.where)
        for file in log_files(Path(one.folder, "logs"), options.task)
    ]
    if not files:
        raise UserError(f"{options.where}: no log yet; see speechllm-submit status")
    newest = max(files, key=lambda file: file.stat().st_mtime)
    for file in sorted(files):
        print(f"{'==>' if file == newest else '   '} {file}", file=sys.stderr)
    with newest.open(encoding="utf-8", errors="replace") as text:
        lines = text.readlines()
        print("".join(lines[max(0, len(lines) - options.lines) :]), end="", flush=True)
        try:
            while options.follow:
                print(text.read(), end="", flush=True)
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0
    return 0


def log_files(folder: Path, task: int | None) -> list[Path]:
    """Logs of a job, or of one task of it: NAME.ID.log, NAME.ID.TASK.log."""
    return sorted(folder.glob("*.log" if task is None else f"*.*.{task}.log"))


def cancel(options: argparse.Namespace) -> int:
    for submission in find_submissions(options.where):
        job = read_job(Path(submission.folder) / "job.json")
        wait = 0.0 if options.now else options.wait
        print(f"{job.name}: {cancel_job(job, submission, batch_of(job.site), wait)}")
    return 0


def cancel_job(
    job: Job,
    submission: Submission,
    batch: Batch,
    wait: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Ask a running job to save and end, delete it then; what became of it, for people.

    The wish is a file that the job's nodes look for, so that it works on every site and saving may
    take longer than the batch system's own warning time.
    """
    started = started_ids(read_jsonl(part.attempts) for part in parts_of(job))
    ids = [*submission.job_ids, *sorted(started - set(submission.job_ids))]
    if not _tasks(batch, ids):
        return "not in the queue"
    asked, began = time.time(), clock()
    job.cancel.touch()
    running = _running(batch, ids)
    idle = [one for one in submission.job_ids if one not in running]
    if idle:
        batch.delete(idle)
    until = began + wait
    while running and clock() < until:
        if _has_saved(job, asked):  # then it leaves by itself, and writes down how it ended
            until = min(until, clock() + LEAVING)
        sleep(1.0)
        running = _running(batch, ids)
    if left := sorted({task.job_id for task in _tasks(batch, ids)}):
        batch.delete(left)
    if _has_saved(job, asked):
        return f"saved at step {(read_status(job.run) or {}).get('step')} and cancelled"
    return "cancelled"


def _tasks(batch: Batch, ids: Sequence[str]) -> Sequence[QueuedTask]:
    return [task for task in batch.queued() if task.job_id in ids]


def _running(batch: Batch, ids: Sequence[str]) -> set[str]:
    return {task.job_id for task in _tasks(batch, ids) if task.state == "running"}


def _has_saved(job: Job, asked: float) -> bool:
    status = read_status(job.run) or {}
    return status.get("state") in ("saved", "done") and float(status["time"]) >= asked

"""Handing a job to the batch system, and keeping in the run directory what was handed over."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from speechllm.cluster.batch import Batch, BatchError, Client
from speechllm.cluster.gridengine import GridEngine
from speechllm.cluster.job import Job, write_job
from speechllm.cluster.profile import SiteProfile, dump_profile
from speechllm.cluster.render import job_script, submit_arguments
from speechllm.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Submission:
    """submission.json. job_ids: the newest last; those of a chain wait for each other. commands:
    the argument lists. time: Unix seconds."""

    name: str
    kind: str
    folder: str
    job_ids: list[str]
    commands: list[list[str]]
    revision: str
    time: float


def batch_of(site: SiteProfile) -> Batch:
    prefix = tuple(word.replace("{repository}", str(REPOSITORY)) for word in site.client)
    if site.kind == "slurm":
        from speechllm.cluster.slurm import Slurm

        return Slurm(Client(prefix))
    return GridEngine(Client(prefix))


def submit_job(
    job: Job,
    batch: Batch,
    *,
    hold: Sequence[str] = (),
    chain: int = 1,
    files: Mapping[str, str] | None = None,
) -> Submission:
    """Write the job's folder and submit it, `chain` times in a row, each held on the one before.

    A chain goes on where a job ends for good although work is left, as on a site that does not
    start jobs again; a link that finds the work done ends at once.

    files: further ones for the folder, name -> text.

    Raises:
        BatchError: refused, or a job of this name and run directory is still in the queue.
    """
    refuse_double(job, batch)
    write_folder(job, files)
    ids: list[str] = []
    commands: list[list[str]] = []
    for _ in range(chain):
        arguments = submit_arguments(job, ids[-1:] or hold)
        ids.append(batch.submit(arguments, job.name))
        commands.append([program_of(job.site), *arguments])
        submission = Submission(
            job.name, job.kind, str(job.folder), list(ids), commands, job.revision, time.time()
        )
        _write(job.folder / "submission.json", submission)
    _remember(submission)
    return submission


def program_of(site: SiteProfile) -> str:
    return "sbatch" if site.kind == "slurm" else "qsub"


def write_folder(job: Job, files: Mapping[str, str] | None = None) -> None:
    """job.json, script.sh, site.yaml and the files given; a wish to cancel from an earlier time is
    taken back. Never while a job of this folder waits or runs: it reads them again."""
    job.logs.mkdir(parents=True, exist_ok=True)
    job.cancel.unlink(missing_ok=True)
    write_job(job)
    job.script.write_text(job_script(job), encoding="utf-8")
    job.script.chmod(0o755)
    for name, text in {"site.yaml": dump_profile(job.site), **(files or {})}.items():
        (job.folder / name).write_text(text, encoding="utf-8")


def refuse_double(job: Job, batch: Batch) -> None:
    """Two jobs of one folder would only wait for each other's lease."""
    earlier = read_submission(job.folder)
    known = set(earlier.job_ids) if earlier else set()
    still = sorted({task.job_id for task in batch.queued() if task.job_id in known})
    if still:
        raise BatchError(
            f"{job.name} of {job.run_dir} is in the queue already (job {', '.join(still)}): cancel "
            "it first (speechllm-submit cancel), or give this one another --name"
        )


def read_submission(folder: Path) -> Submission | None:
    """None where nothing was submitted from this folder."""
    file = folder / "submission.json"
    if not file.is_file():
        return None
    return Submission(**json.loads(file.read_text(encoding="utf-8")))


def find_submissions(where: str) -> list[Submission]:
    """Those of a run directory, oldest first; or the one with this job id or (newest) job name.

    Raises UserError where there is none.
    """
    if Path(where).is_dir():
        files = Path(where, "cluster").glob("*/submission.json")
        found = [one for file in files if (one := read_submission(file.parent))]
        if not found:
            raise UserError(f"{where}: nothing was submitted from this directory")
        return sorted(found, key=lambda one: one.time)
    for folder in reversed(_history()):
        submission = read_submission(Path(folder))
        if submission and where in (*submission.job_ids, submission.name):
            return [submission]
    raise UserError(f"{where}: neither a run directory nor a job that you submitted")


@cache
def revision_of(repository: Path) -> str:
    """The commit, with -dirty where files differ from it; empty where it is no git checkout."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(repository), *words], capture_output=True, text=True
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "-uno") else commit


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "speechllm" / "submitted"


def _history() -> list[str]:
    """Folders of what this user submitted, the oldest first."""
    file = _history_file()
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _remember(submission: Submission) -> None:
    file = _history_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{submission.folder}\n")


def _write(file: Path, submission: Submission) -> None:
    content: dict[str, Any] = asdict(submission)
    aside = file.with_name(f".{file.name}.new")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)

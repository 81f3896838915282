"""One submitted job, as data: everything that its nodes need, in RUN/cluster/NAME/job.json.

No text in it is ever read by a shell. The files of a job:

    RUN/cluster/NAME/job.json         this
                     script.sh        what the batch system runs on each node
                     site.yaml        the profile as it was
                     config.yaml      train: the configuration as it was
                     submission.json  arguments, ids of the jobs, revision, time
                     logs/            what the job printed
                     meeting/         where its nodes meet
                     attempts.jsonl   one line for each start and end of the whole job
                     cancel           exists when the user wants it to save and end
                     taskK/           meeting/ and attempts.jsonl of task K, where each task of an
                                      array works by itself
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from speechllm.cluster.profile import SiteProfile
from speechllm.cluster.sections import AbsolutePath
from speechllm.config.section import Section
from speechllm.errors import ConfigError

Kind = Literal["train", "generate", "probe", "shard", "score", "command"]
# These run under torchrun or deepspeed, on all nodes of the job together.
LAUNCHED: tuple[Kind, ...] = ("train", "generate", "probe")


class Variant(Section):
    """What one task of an array does differently, where each task works by itself."""

    arguments: tuple[str, ...] = Field((), description="Follow the job's own arguments.")
    run_dir: AbsolutePath | None = Field(None, description="Its run directory; none: the job's.")


class Job(Section):
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", description="As the queue shows it.")
    kind: Kind
    run_dir: AbsolutePath
    arguments: tuple[str, ...] = Field(
        description="What follows the interpreter; see `after_python`."
    )
    variants: tuple[Variant, ...] = Field(
        (), description="One for each task of an array of single jobs; none: no such array."
    )
    directory: AbsolutePath = Field(description="Working directory, where it was submitted.")
    nodes: int = Field(1, ge=1)
    min_nodes: int = Field(1, ge=1, description="A group that lost a node goes on with so many.")
    procs_per_node: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    mode: Literal["array", "pe", "single"] = Field(
        "single",
        description="array: each task is a node of one group; pe: the nodes of $PE_HOSTFILE are; "
        "single: one host, or an array of such tasks, one for each variant.",
    )
    max_attempts: int = Field(5, ge=1, description="Without progress, before a person is asked.")
    time_limit: float | None = Field(None, description="Seconds a start of the job has; see site.")
    site: SiteProfile
    python: AbsolutePath
    repository: AbsolutePath
    revision: str = Field("", description="Of git, with -dirty where files were changed.")
    task: int | None = Field(None, description="Set by `for_task`; never in the file.")
    task_run_dir: AbsolutePath | None = Field(None, description="Likewise.")

    @model_validator(mode="after")
    def _fits_together(self) -> Job:
        if self.mode == "single" and self.nodes > 1:
            raise ValueError("a job of several nodes has mode array or pe")
        if self.mode == "array" and self.variants:
            raise ValueError("tasks of mode array are nodes; they have no variants")
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is above nodes {self.nodes}")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.run_dir, "cluster", self.name)

    @property
    def file(self) -> Path:
        return self.folder / "job.json"

    @property
    def script(self) -> Path:
        return self.folder / "script.sh"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def run(self) -> Path:
        """Where the processes write status.json and checkpoints."""
        return Path(self.task_run_dir or self.run_dir)

    @property
    def own(self) -> Path:
        """The folder for what the nodes keep: of this task, where each task works by itself."""
        return self.folder if self.task is None else self.folder / f"task{self.task}"

    @property
    def meeting(self) -> Path:
        return self.own / "meeting"

    @property
    def attempts(self) -> Path:
        return self.own / "attempts.jsonl"

    @property
    def cancel(self) -> Path:
        return self.folder / "cancel"

    @property
    def tasks(self) -> int:
        """Tasks of the array; 0: no array job."""
        return self.nodes if self.mode == "array" else len(self.variants)

    @property
    def is_launched(self) -> bool:
        """Whether torchrun or deepspeed starts it."""
        return self.kind in LAUNCHED

    @property
    def after_python(self) -> tuple[str, ...]:
        """What follows `python`, or `torchrun ...`, or `deepspeed ...`: a script or -m MODULE, and
        its arguments."""
        if self.kind in ("train", "generate"):
            return ("-m", "speechllm", *self.arguments)
        return self.arguments

    def for_task(self, task: int) -> Job:
        """What task 1, 2, ... of an array of single jobs does; the job itself where it is none."""
        if not self.variants:
            return self
        variant = self.variants[task - 1]
        return self.model_copy(
            update={
                "arguments": (*self.arguments, *variant.arguments),
                "task": task,
                "task_run_dir": variant.run_dir,
                "variants": (),
            }
        )


def write_job(job: Job) -> None:
    """Write job.json, by rename."""
    job.folder.mkdir(parents=True, exist_ok=True)
    aside = job.file.with_name(f".job.json.{os.getpid()}")
    aside.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")
    aside.replace(job.file)


def read_job(file: Path) -> Job:
    """Raises ConfigError where it is no such file."""
    try:
        return Job.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; submit the job again") from None
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"{file}: not a job that speechllm-submit wrote: {error}") from None

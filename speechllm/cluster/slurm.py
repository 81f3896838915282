"""Slurm's own commands, as far as speechllm-submit needs them; never tried on a real Slurm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from speechllm.cluster.batch import BatchError, Client, Output, QueuedTask, State

_FORMAT = "%A|%a|%T|%N|%V|%C|%F|%j"


@dataclass(frozen=True)
class Slurm:
    client: Client

    def submit(self, arguments: Sequence[str], name: str) -> str:
        """Raises BatchError where sbatch refuses. sbatch itself tries a busy controller again."""
        output = self._ask("sbatch", *arguments)
        if output.code:
            raise BatchError(f"sbatch refuses {name}: {output.err}")
        return output.out.strip().partition(";")[0]

    def queued(self) -> list[QueuedTask]:
        """Every task of the user's own jobs."""
        return parse_queue(self._ask("squeue", "--me", "-h", "-r", "-o", _FORMAT).out)

    def why_pending(self, job_id: str) -> list[str]:
        return sorted(
            set(self._ask("squeue", "-h", "-j", job_id, "-o", "%r").out.split("\n")) - {""}
        )

    def exit_codes(self, job_id: str, task: int | None) -> list[int]:
        which = job_id if task is None else f"{job_id}_{task}"
        answer = self._ask("sacct", "-n", "-P", "-X", "-j", which, "-o", "State,ExitCode")
        return [_exit_code(*line.split("|")) for line in answer.out.splitlines()]

    def delete(self, job_ids: Sequence[str]) -> None:
        output = self._ask("scancel", *job_ids)
        if output.code and "Invalid job id" not in output.err:
            raise BatchError(f"scancel {' '.join(job_ids)}: {output.err}")

    def _ask(self, *words: str) -> Output:
        return self.client.patiently(*words, is_busy=_is_away)


def _is_away(output: Output) -> bool:
    return output.code != 0 and bool(re.search("Unable to contact slurm controller", output.err))


def _exit_code(state: str, code: str) -> int:
    """A job that met its limit, or was killed, has exit code 0 (`0:0`, `0:SIGNAL`) too."""
    return int(code.partition(":")[0]) or int(state != "COMPLETED")


def parse_queue(text: str) -> list[QueuedTask]:
    """Lines of `squeue -h -r -o FORMAT`."""
    rows = []
    for line in text.splitlines():
        job_id, task, code, host, since, cpus, array_id, name = line.split("|", 7)
        rows.append(
            QueuedTask(
                job_id=array_id if task.isdigit() else job_id,
                name=name,
                state=_state(code),
                code=code,
                task=int(task) if task.isdigit() else None,
                host=host or None,
                since=since,
                slots=int(cpus),
            )
        )
    return rows


def _state(code: str) -> State:
    match code:
        case "PENDING" | "REQUEUED" | "CONFIGURING":
            return "pending"
        case "REQUEUE_HOLD" | "RESV_DEL_HOLD" | "SPECIAL_EXIT":
            return "held"
        case "SUSPENDED" | "STOPPED":
            return "suspended"
        case "COMPLETING" | "CANCELLED":
            return "deleting"
        case "RUNNING" | "SIGNALING" | "STAGE_OUT" | "RESIZING":
            return "running"
    return "error"

"""Grid Engine's own commands: submit, list, delete, account. No text passes through a shell."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

from speechllm.cluster.batch import BatchAway, BatchError, Client, Output, QueuedTask, State

# The master could not be reached: nothing has happened.
_AWAY = re.compile(
    r"commlib error|unable to contact qmaster|unable to send message|got send error|qmaster.*not up"
)
# The master was reached but did not answer in time: the job may have been taken.
_UNCLEAR = re.compile(r"failed receiving gdi request|receive timeout|got no valid response")
# In `qstat -j`, of each task in error state: `error reason  1:  DATE TIME [IDS]: TEXT`.
_ERROR = re.compile(r"^error reason\s*\d*:\s*(?:\S+ \S+ \[[\d:]+\]: )?(.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class GridEngine:
    client: Client

    def submit(self, arguments: Sequence[str], name: str) -> str:
        """Submit by `qsub` with these arguments (which ask for `-terse -w e`); the job's id.

        A busy master is asked again. Where it may have taken the job without telling, the queue is
        looked at first, so that a job is never submitted twice.

        Raises:
            BatchError: refused; with the scheduler's reasons where no host could ever run it.
            BatchAway: no answer for too long.
        """
        before, waited = self._ids_of(name), 0.0

        while True:
            output = self.client.patiently("qsub", *arguments, is_busy=_is_away)
            if output.code == 0:
                return _job_id(output.out)
            if not _is_unclear(output):
                raise BatchError(f"qsub refuses {name}: {self._reason(output.err, arguments)}")
            if waited >= self.client.patience:
                raise BatchAway(f"qsub {name}: {output.err}; look at qstat before you retry")
            self.client.sleep(5.0)
            waited += 5.0
            if taken := self._ids_of(name) - before:
                return max(taken, key=int)

    def queued(self) -> list[QueuedTask]:
        """Every task of the user's own jobs, running ones first."""
        return parse_queue(self._queue("-g", "d"))

    def why_pending(self, job_id: str) -> list[str]:
        """Why a start has failed, then the scheduler's reasons; none where it does not tell
        (schedd_job_info)."""
        output = self._ask("qstat", "-j", job_id)
        failed, _, reasons = output.out.partition("scheduling info:")
        lines = [*_ERROR.findall(failed), *(line.strip() for line in reasons.splitlines())]
        return [line for line in dict.fromkeys(lines) if line]

    def delete(self, job_ids: Sequence[str]) -> None:
        """Jobs that are gone already are no error."""
        output = self._ask("qdel", *job_ids)
        if output.code and "does not exist" not in output.out + output.err:
            raise BatchError(f"qdel {' '.join(job_ids)}: {output.out}{output.err}")

    def accounting(self, job_id: str) -> list[dict[str, str]]:
        """qacct's records of the ended tasks and attempts; none yet for some seconds after an
        end."""
        return parse_accounting(self._ask("qacct", "-j", job_id).out)

    def exit_codes(self, job_id: str, task: int | None) -> list[int]:
        """Of the last attempts of a job, or of one task of it; empty while there is no record."""
        last = {record["taskid"]: record for record in self.accounting(job_id)}
        return [
            _exit_code(record)
            for number, record in last.items()
            if task is None or number == str(task)
        ]

    def facts(self, *question: str) -> dict[str, str]:
        """`qconf QUESTION` as name -> value; empty where there is no such object."""
        output = self._ask("qconf", *question)
        return parse_facts(output.out) if output.code == 0 else {}

    def complexes(self) -> dict[str, dict[str, str]]:
        """`qconf -sc` by name and by shortcut: type, requestable, consumable, ..."""
        return parse_complexes(self._ask("qconf", "-sc").out)

    def _ask(self, *words: str) -> Output:
        """For what may be asked twice without harm: all but qsub."""
        return self.client.patiently(*words, is_busy=lambda o: _is_away(o) or _is_unclear(o))

    def _queue(self, *options: str) -> str:
        output = self._ask("qstat", "-xml", *options)
        if output.code:
            raise BatchError(f"qstat fails: {output.err or output.out}")
        return output.out

    def _ids_of(self, name: str) -> set[str]:
        rows = ElementTree.fromstring(self._queue()).iter("job_list")
        return {_text(row, "JB_job_number") for row in rows if _text(row, "JB_name") == name}

    def _reason(self, error: str, arguments: Sequence[str]) -> str:
        """`-w e` says only that no queue fits; a dry scheduling run (`-w v`) says why."""
        said = _reasons(error)
        if "no suitable queues" not in error:
            return said
        verify = ["v" if previous == "-w" else word for previous, word in _pairs(arguments)]
        return f"no host could ever run it: {_reasons(self._ask('qsub', *verify).err)}"


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(["", *words], words, strict=False))


def _is_away(output: Output) -> bool:
    return output.code != 0 and bool(_AWAY.search(output.err))


def _is_unclear(output: Output) -> bool:
    return output.code != 0 and bool(_UNCLEAR.search(output.err))


def _reasons(error: str, most: int = 6) -> str:
    noise = re.compile(r"^(Unable to run job: )?(error: )?(Job \d+ |verification: )?")
    lines = [
        noise.sub("", line)
        for line in error.splitlines()
        if line and line != "Exiting." and "not contained in its hard queue list" not in line
    ]
    lines = list(dict.fromkeys(lines))
    return "; ".join(lines[:most]) + (
        f"; and {len(lines) - most} more" if len(lines) > most else ""
    )


def _job_id(text: str) -> str:
    """`12`, or `12.1-4:1` of an array; site hooks may have printed lines before it."""
    match = re.search(r"^(\d+)(\.\d+-\d+:\d+)?\s*$", text, re.MULTILINE)
    if match is None:
        raise BatchAway(f"qsub told no job id but {text.strip()!r}; look at qstat before you retry")
    return match[1]


def parse_queue(xml: str) -> list[QueuedTask]:
    """Rows of `qstat -xml -g d`."""
    return [
        QueuedTask(
            job_id=_text(row, "JB_job_number"),
            name=_text(row, "JB_name"),
            state=state_of(_text(row, "state")),
            code=_text(row, "state"),
            task=int(_text(row, "tasks")) if _text(row, "tasks").isdigit() else None,
            host=_text(row, "queue_name").rpartition("@")[2] or None,
            since=_text(row, "JAT_start_time") or _text(row, "JB_submission_time"),
            slots=int(_text(row, "slots") or 1),
        )
        for row in ElementTree.fromstring(xml).iter("job_list")
    ]


def _text(row: ElementTree.Element, name: str) -> str:
    return (row.findtext(name) or "").strip()


def state_of(code: str) -> State:
    """Letters of qstat's state column: r, t, qw, hqw, Eqw, dr, s, S, T, Rr, ..."""
    if "E" in code:
        return "error"
    if "d" in code:
        return "deleting"
    if "w" in code or "q" in code:
        return "held" if "h" in code else "pending"
    return "suspended" if set(code) & set("sST") else "running"


def parse_accounting(text: str) -> list[dict[str, str]]:
    records: list[dict[str, str]] = []
    for line in text.splitlines():
        if line.startswith("====="):
            records.append({})
        elif records and (fields := line.split(None, 1)):
            records[-1][fields[0]] = fields[1].strip() if len(fields) > 1 else ""
    return records


def _exit_code(record: dict[str, str]) -> int:
    """A start that came to nothing has exit_status 0 too; `failed` is the number of its cause."""
    status, failed = (int(record.get(name, "0").split()[0]) for name in ("exit_status", "failed"))
    return status or int(failed != 0)


def parse_facts(text: str) -> dict[str, str]:
    """Lines of `name value`; qconf folds long ones with a backslash."""
    unfolded = re.sub(r"\s*\\\n\s*", " ", text)
    facts = {}
    for line in unfolded.splitlines():
        if not line.startswith("#") and (fields := line.split(None, 1)):
            facts[fields[0]] = fields[1].strip() if len(fields) > 1 else ""
    return facts


def parse_complexes(text: str) -> dict[str, dict[str, str]]:
    names = ("name", "shortcut", "type", "relop", "requestable", "consumable", "default", "urgency")
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == len(names) and not line.startswith("#"):
            row = dict(zip(names, fields, strict=True))
            found[row["name"]] = found[row["shortcut"]] = row
    return found

"""A batch system for tests: commands that note their arguments and answer from a list."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechllm.cluster.batch import QueuedTask

COMMANDS = ("qsub", "qstat", "qdel", "qacct", "qconf", "sbatch", "squeue", "scancel", "scontrol")
EMPTY_QUEUE = "<job_info><queue_info/><job_info/></job_info>"
# Answers the next one of NAME.json's list, and the last one for ever.
_SCRIPT = """\
import json, sys
from pathlib import Path
name, folder = Path(sys.argv[0]).name, Path({folder!r})
with open(folder / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
file = folder / (name + ".json")
answers = json.loads(file.read_text())
if len(answers) > 1:
    file.write_text(json.dumps(answers[1:]))
out, err, code = answers[0]
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class FakeGrid:
    """Executables in a folder that is to be the first of PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            script = _SCRIPT.format(folder=str(folder))
            (self.bin / name).write_text(f"#!{sys.executable} -SE\n{script}")
            (self.bin / name).chmod(0o755)
            self.answer(name, "")
        self.answer("qstat", EMPTY_QUEUE)

    def answer(self, name: str, *answers: str | tuple[str, str, int]) -> None:
        """Texts of standard output, or (output, errors, exit code)."""
        full = [(one, "", 0) if isinstance(one, str) else one for one in answers]
        (self.folder / f"{name}.json").write_text(json.dumps(full))

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of each call, in order."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words[1:] for line in lines if (words := json.loads(line))[0] == name]

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"


@dataclass
class FakeBatch:
    """queues: what `queued` answers, one after the other, the last for ever."""

    queues: list[list[QueuedTask]] = field(default_factory=lambda: [[]])
    reasons: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    submitted: list[list[str]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    def submit(self, arguments: Sequence[str], name: str) -> str:
        self.submitted.append(list(arguments))
        return str(len(self.submitted))

    def queued(self) -> list[QueuedTask]:
        return self.queues.pop(0) if len(self.queues) > 1 else self.queues[0]

    def why_pending(self, job_id: str) -> list[str]:
        return self.reasons

    def exit_codes(self, job_id: str, task: int | None) -> list[int]:
        return self.codes

    def delete(self, job_ids: Sequence[str]) -> None:
        self.deleted += job_ids

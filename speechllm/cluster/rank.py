"""`python -m speechllm.cluster.rank`: one process of a run, which leaves its exit code behind.

Launchers make one code of all, so each process writes its own where the node runner finds it, and
its process id so that signals find it. What it runs comes as JSON in an environment variable,
because launchers read their program's options as if they were their own.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechllm.cluster.group import AGAIN
from speechllm.cluster.signals import die_with_parent, ignore_stop_signals

ARGUMENTS, RECORDS = "SPEECHLLM_RANK_ARGUMENTS", "SPEECHLLM_RANK_RECORDS"
VISIBLE, DEVICES = "CUDA_VISIBLE_DEVICES", "SPEECHLLM_RANK_DEVICES"


@dataclass(frozen=True)
class RankRecord:
    """code: None while it runs, and for ever where it was killed."""

    rank: int
    pid: int
    code: int | None


def rank_environment(after_python: Sequence[str], records: Path) -> dict[str, str]:
    """after_python: `-m MODULE ARGUMENT...` or `FILE ARGUMENT...`."""
    return {ARGUMENTS: json.dumps(list(after_python)), RECORDS: str(records)}


def read_records(folder: Path) -> list[RankRecord]:
    files = sorted(folder.glob("rank_*.json"))
    return [RankRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def main(environment: Mapping[str, str] = os.environ) -> int:
    die_with_parent()
    if DEVICES in environment:  # deepspeed's launcher puts 0, 1, ... over what was claimed
        os.environ[VISIBLE] = environment[DEVICES]
    rank = int(environment.get("RANK", "0"))
    folder = Path(environment[RECORDS])
    _write(folder, RankRecord(rank, os.getpid(), None))
    code = 1
    try:
        code = _run(json.loads(environment[ARGUMENTS]))
    finally:
        ignore_stop_signals()  # Python's own end restores the defaults, by which one would kill
        _write(folder, RankRecord(rank, os.getpid(), code))
    # To a launcher every code but 0 is a failure, which it tells at length, and it kills the rest.
    # All ranks leave with AGAIN together, each after the checkpoint is there.
    return 0 if code == AGAIN else code


def _run(words: list[str]) -> int:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _write(folder: Path, record: RankRecord) -> None:
    file = folder / f"rank_{record.rank:05d}.json"
    aside = file.with_name(f".{file.name}.{record.pid}")
    aside.write_text(json.dumps(record.__dict__), encoding="utf-8")
    aside.replace(file)


if __name__ == "__main__":
    sys.exit(main())

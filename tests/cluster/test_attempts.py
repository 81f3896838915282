"""When starting again has become useless, and what the record says."""

from __future__ import annotations

import json
import time

import pytest
from node_jobs import job_of

from speechllm.cluster.attempts import Attempt, Attempts, events, judge, without_progress
from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.group import AGAIN, PERSON, Result


def attempt(number: int, step_before: int | None, code: int | None = AGAIN, **more) -> Attempt:
    task, job_id = more.pop("task", 1), more.pop("job_id", "7")
    one = Attempt(task, number, job_id, "h", 100.0 * number, step_before, **more)
    one.code = code
    one.ended = None if code is None else one.started + 50
    one.reason = None if code is None else f"reason {number}"
    return one


AGAIN_NOW = Result(AGAIN, "preempted")


@pytest.mark.parametrize(
    ("attempts", "step", "vain"),
    [
        ([attempt(1, None)], None, 1),
        ([attempt(1, None), attempt(2, 10), attempt(3, 10)], 10, 2),
        ([attempt(1, 10), attempt(2, 10, None), attempt(3, 10)], 10, 3),
        ([attempt(1, 10), attempt(2, 10)], 20, 0),
        ([attempt(1, 10), attempt(2, 10, PERSON), attempt(3, 10)], 10, 1),
        ([attempt(1, 10), attempt(2, 10, 0), attempt(3, 10)], 10, 1),
        ([attempt(1, 10, task=2), attempt(1, 10)], 10, 1),
        ([attempt(1, 10, job_id="6"), attempt(2, 10), attempt(3, 10)], 10, 2),
    ],
    ids=["first", "moved", "killed", "progress", "after a person", "after done", "other task",
         "submitted again"],
)  # fmt: skip
def test_attempts_in_vain(attempts, step, vain):
    assert len(without_progress(attempts, 1, step)) == vain


def test_a_person_is_asked_at_the_last_attempt_and_told_why():
    attempts = [attempt(1, 5), attempt(2, 5, None), attempt(3, 5)]
    assert judge(AGAIN_NOW, attempts, 1, 5, most=4) is AGAIN_NOW
    assert judge(AGAIN_NOW, attempts, 1, 6, most=3) is AGAIN_NOW
    asked = judge(AGAIN_NOW, attempts, 1, 5, most=3)
    assert asked.code == PERSON
    assert "3 attempts in a row without progress (the newest checkpoint is still step 5)" in (
        asked.reason
    )
    assert "The last: preempted" in asked.reason
    assert "Before that: reason 1; killed" in asked.reason
    for other in (Result(0, "done"), Result(1, "bug")):
        assert judge(other, attempts, 1, 5, most=1) is other


def test_records_are_files_of_their_own_and_make_one_list(tmp_path):
    job = job_of(tmp_path, "train", "x", mode="array", nodes=2)
    attempts = Attempts(job)
    first, second = attempts.begin(1, "7", "hostA"), attempts.begin(2, "7", "hostB")
    for rank, one in enumerate((first, second)):
        one.generation, one.rank, one.hosts = 1, rank, ["hostA", "hostB"]
        attempts.save(one)
    (tmp_path / "checkpoints" / "step_00000008").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000009").mkdir()
    (tmp_path / "checkpoints" / "step_00000008" / "COMPLETE").touch()
    attempts.end(second, Result(AGAIN, "saved"))
    attempts.end(first, Result(AGAIN, "saved"))
    again = attempts.begin(1, "7", "hostC")
    assert (again.number, again.step_before) == (2, 8)
    attempts.end(again, Result(AGAIN, "nobody came"))
    lines = [json.loads(line) for line in job.attempts.read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("start", None), ("end", 8), ("start", 8), ("end", 8),
    ]  # fmt: skip
    assert lines[0]["hosts"] == ["hostA", "hostB"]
    assert lines[3]["reason"] == "nobody came"
    assert {line["job_id"] for line in lines} == {"7"}
    assert [one.number for one in attempts.read()] == [1, 2, 1]


def test_a_host_whose_clock_is_behind_does_not_upset_the_order(tmp_path, monkeypatch):
    job = job_of(tmp_path, "train", "x")
    for ahead in (0, -300):
        now = time.time() + ahead
        monkeypatch.setattr(time, "time", lambda now=now: now)
        attempts = Attempts(job)
        one = attempts.begin(1, "7", f"host{ahead}")
        attempts.end(one, Result(AGAIN if ahead == 0 else 0, "ended"))
        monkeypatch.undo()
    lines = [json.loads(line) for line in job.attempts.read_text().splitlines()]
    assert [line.get("code") for line in lines] == [None, AGAIN, None, 0]


def test_nodes_that_end_together_lose_no_line(tmp_path, monkeypatch):
    """The second has read the records before the first one's end, and writes the list after it."""
    job = job_of(tmp_path, "train", "x", mode="array", nodes=2)
    first, second = Attempts(job), Attempts(job)
    lead, other = first.begin(1, "7", "hostA"), second.begin(2, "7", "hostB")
    lead.rank, other.rank = 0, 1
    write = SharedFolder.write

    def overtaken(folder: SharedFolder, name: str, text: str) -> None:
        if name == job.attempts.name and lead.code is None:
            first.end(lead, Result(0, "done"))
        write(folder, name, text)

    monkeypatch.setattr(SharedFolder, "write", overtaken)
    second.end(other, Result(0, "done"))
    events = [json.loads(line)["event"] for line in job.attempts.read_text().splitlines()]
    assert events == ["start", "end"]


def test_a_second_task_that_asks_for_a_person_is_in_the_list():
    lines = events([attempt(1, 5, 1, rank=0), attempt(1, 5, PERSON, task=2, rank=1)])
    assert [(line["event"], line["task"]) for line in lines] == [
        ("start", 1), ("end", 1), ("end", 2),
    ]  # fmt: skip

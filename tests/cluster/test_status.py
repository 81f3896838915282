from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from fake_grid import FakeBatch
from rich.console import Console

from speechllm.cluster.batch import QueuedTask
from speechllm.cluster.job import Job, Variant, write_job
from speechllm.cluster.profile import load_profile
from speechllm.cluster.status import Row, ended_state, queue_state, rows_of, table_of
from speechllm.cluster.submission import Submission, find_submissions, submit_job
from speechllm.cluster.submit import main
from speechllm.errors import UserError


@pytest.fixture(autouse=True)
def _own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def job_in(run_dir: Path, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "name": "asr", "kind": "train", "run_dir": str(run_dir), "directory": str(run_dir),
        "arguments": ("train", "c.yaml"), "python": "/opt/python", "repository": "/opt/code",
        "site": load_profile("but"), "nodes": 2, "mode": "array",
    }  # fmt: skip
    job = Job(**values | fields)
    write_job(job)
    return job


def submission_of(job: Job, *ids: str) -> Submission:
    return Submission(job.name, job.kind, str(job.folder), list(ids) or ["7"], [], "", 1.0)


def task(state: Any, number: int | None = 1, host: str | None = "n1", job_id: str = "7") -> Any:
    return QueuedTask(job_id, "asr", state, "x", number, host)


def note(job: Job, *events: dict[str, Any]) -> None:
    job.attempts.parent.mkdir(parents=True, exist_ok=True)
    job.attempts.write_text("".join(json.dumps(event) + "\n" for event in events))


START = {"event": "start", "time": 1.0, "generation": 1, "hosts": ["n1", "n2"], "job_id": "7"}
PROGRESS = {
    "state": "running", "step": 40, "steps": 100, "epoch": 1, "loss": 1.25, "eta_seconds": 100.0,
    "utterances_per_second": 8.0,
}  # fmt: skip


def test_a_running_job(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, START, {"event": "end", "code": 99, "reason": "SIGUSR2"}, START)
    (tmp_path / "status.json").write_text(json.dumps(PROGRESS | {"time": time.time() - 30}))
    job.logs.mkdir()
    for name, age in (("asr.7.1.log", 500), ("asr.7.2.log", 20)):
        (job.logs / name).write_text("line\n")
        os.utime(job.logs / name, (time.time() - age,) * 2)
    batch = FakeBatch([[task("running"), task("running", 2, "n3"), task("running", job_id="8")]])
    [row] = rows_of(submission_of(job), batch)
    assert (row.state, row.tasks, row.hosts) == ("running", {"running": 2}, ["n1", "n3"])
    assert (row.attempts, row.step, row.steps, row.loss) == (2, 40, 100, 1.25)
    assert row.eta_seconds == pytest.approx(70, abs=5)
    assert row.last_line_seconds == pytest.approx(20, abs=5)
    assert row.reason == ""


def test_a_run_that_is_being_started_again_tells_no_time_left(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, START, {"event": "end", "code": 99, "reason": "SIGUSR2"}, START)
    saved = PROGRESS | {"state": "saved", "time": time.time() - 7200}
    (tmp_path / "status.json").write_text(json.dumps(saved))
    [row] = rows_of(submission_of(job), FakeBatch([[task("running")]]))
    assert (row.state, row.step, row.eta_seconds) == ("running", 40, None)


def test_why_a_job_waits_is_told(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    batch = FakeBatch([[task("pending", None, None)]], reasons=["no gpu", "queue full"])
    [row] = rows_of(submission_of(job), batch)
    assert (row.state, row.reason, row.hosts) == ("pending", "no gpu; queue full", [])
    assert (row.eta_seconds, row.last_line_seconds, row.attempts) == (None, None, 0)


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (99, "saved"), (100, "needs you"), (1, "failed"), (137, "failed")],
)
def test_how_a_job_ended(tmp_path: Path, code: int, state: str) -> None:
    job = job_in(tmp_path)
    note(job, START, {"event": "end", "code": code, "reason": "because"})
    (tmp_path / "status.json").write_text(json.dumps(PROGRESS | {"time": time.time()}))
    [row] = rows_of(submission_of(job), FakeBatch(codes=[0]))
    assert (row.state, row.hosts, row.eta_seconds) == (state, ["n1", "n2"], None)
    assert row.reason == ("" if code == 0 else "because")


@pytest.mark.parametrize(
    ("codes", "state", "reason"),
    [
        ([], "ended", "no record"),
        ([0, 0], "done", ""),
        ([0, 1, 0], "failed", "1 of 3 tasks ended with 1"),
        ([100], "needs you", "1 of 1 tasks ended with 100"),
    ],
)
def test_a_job_that_left_no_files_is_looked_up(
    tmp_path: Path, codes: list[int], state: str, reason: str
) -> None:
    job = job_in(tmp_path, kind="shard", nodes=1, mode="single", variants=(Variant(), Variant()))
    [row] = rows_of(submission_of(job), FakeBatch(codes=codes))
    assert row.state == state
    assert reason in row.reason


def test_an_array_has_one_row_of_all_its_tasks(tmp_path: Path) -> None:
    variants = (Variant(arguments=("--task", "1")), Variant(arguments=("--task", "2")))
    job = job_in(tmp_path, kind="shard", nodes=1, mode="single", variants=variants)
    good = {"event": "end", "code": 0, "reason": "done"}
    note(job.for_task(1), START | {"hosts": ["n1"]}, good)
    note(job.for_task(2), START | {"hosts": ["n2"]}, good)
    [row] = rows_of(submission_of(job), FakeBatch())
    assert (row.state, row.hosts, row.attempts, row.reason) == ("done", ["n1", "n2"], 1, "")
    (tmp_path / "status.json").write_text(json.dumps(PROGRESS | {"time": 1.0}))
    assert rows_of(submission_of(job), FakeBatch())[0].step is None  # of a training, not of this
    note(job.for_task(2), START, good | {"code": 1, "reason": "it failed"})
    assert rows_of(submission_of(job), FakeBatch())[0].state == "failed"
    note(job.for_task(2), START)  # killed: only the batch system knows
    assert rows_of(submission_of(job), FakeBatch(codes=[0, 137]))[0].state == "failed"


def test_a_sweep_has_a_row_for_each_of_its_runs(tmp_path: Path) -> None:
    variants = tuple(Variant(run_dir=str(tmp_path / name)) for name in ("one", "two"))
    job = job_in(tmp_path, nodes=1, mode="single", variants=variants)
    (tmp_path / "two").mkdir()
    done = PROGRESS | {"state": "done", "step": 100, "time": 1.0}
    (tmp_path / "two" / "status.json").write_text(json.dumps(done))
    one, two = rows_of(submission_of(job), FakeBatch([[task("running", 1)]]))
    assert (one.job, one.state, one.step) == ("asr.1", "running", None)
    assert (two.job, two.state, two.step, two.tasks) == ("asr.2", "done", 100, {})
    assert two.run_dir == str(tmp_path / "two")


def test_a_job_submitted_by_hand_is_known_by_its_attempts(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, START | {"job_id": "55"})
    [row] = rows_of(submission_of(job), FakeBatch([[task("running", job_id="55")]]))
    assert row.state == "running"


def test_a_cancelled_job(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, START, {"event": "end", "code": 0, "reason": "cancelled: saved at step 40"})
    job.cancel.touch()
    assert rows_of(submission_of(job), FakeBatch())[0].state == "cancelled"
    (tmp_path / "status.json").write_text(json.dumps(PROGRESS | {"state": "done", "time": 1.0}))
    assert rows_of(submission_of(job), FakeBatch())[0].state == "done"


def test_a_job_that_was_cancelled_before_it_began(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    job.cancel.touch()
    [row] = rows_of(submission_of(job), FakeBatch())
    assert (row.state, row.reason) == ("cancelled", "")


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, START)
    with job.attempts.open("a") as file:
        file.write('{"event": "en')
    [row] = rows_of(submission_of(job), FakeBatch([[task("running")]]))
    assert row.attempts == 1


def test_the_most_urgent_state_counts() -> None:
    assert queue_state([]) is None
    assert queue_state([task("pending"), task("running")]) == "running"
    assert queue_state([task("running"), task("error")]) == "error"
    assert queue_state([task("held"), task("pending")]) == "pending"


def test_a_run_that_was_killed_has_failed() -> None:
    assert ended_state({}, {"state": "running"}) == "failed"
    assert ended_state({}, {"state": "saved"}) == "saved"
    assert ended_state({"event": "start"}, {}) is None


def test_submissions_are_found_by_run_id_and_name(tmp_path: Path) -> None:
    batch = FakeBatch()
    first, second = job_in(tmp_path / "a"), job_in(tmp_path / "b")
    submit_job(first, batch, chain=2)
    submit_job(second, batch)
    assert [one.job_ids for one in find_submissions(str(tmp_path / "a"))] == [["1", "2"]]
    assert find_submissions("2")[0].folder == str(first.folder)
    assert find_submissions("3")[0].folder == str(second.folder)
    assert find_submissions("asr")[0].folder == str(second.folder)  # the newest of that name
    with pytest.raises(UserError, match="nothing was submitted"):
        find_submissions(str(tmp_path))
    with pytest.raises(UserError, match="neither a run directory nor a job"):
        find_submissions("99")


ROW = Row(
    "asr", "train", ["7"], "/r", "running", {"running": 2}, ["n1"], 1, 4, 9, 1.5, 2.0, 3661, 5
)


def test_the_table_shows_everything() -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table_of([ROW]))
    console.file.close()
    text = console.export_text()
    for part in ("asr (7)", "running", "2 running", "n1", "4/9", "1.500", "1:01:01", "0:00:05 ago"):
        assert part in text


def test_status_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_in(tmp_path)
    submit_job(job, FakeBatch())
    note(job, START)
    monkeypatch.setattr(
        "speechllm.cluster.status.batch_of", lambda _: FakeBatch([[task("running", job_id="1")]])
    )
    assert main(["status", str(tmp_path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["job"], row["state"], row["attempts"], row["hosts"]) == (
        "asr",
        "running",
        1,
        ["n1"],
    )
    assert main(["status", str(tmp_path)]) == 0
    assert "running" in capsys.readouterr().out

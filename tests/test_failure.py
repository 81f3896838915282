from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from safetensors.torch import load_file

import pytest
from forked_ranks import Ended, Ranks
from runs import ROOT, TINY, metrics, tiny_config
from speech_files import write_shards

import speechllm.failure
import speechllm.train
from speechllm.checkpoint import find_checkpoint
from speechllm.cli import main
from speechllm.data.index import open_corpus
from speechllm.errors import DataError
from speechllm.failure import (
    Failure,
    FailureReport,
    Place,
    in_order,
    speaker,
    tell_torchrun,
)
from speechllm.snapshot import CheckpointWriter
from speechllm.train import train
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
FAULT = "the planted fault"


def command(run_dir: Path, shards: Path, *overrides: str) -> list[str]:
    settings = ["data.num_workers=0", "train.steps=6", "train.checkpoint_every=2"]
    settings += ["collective_timeout=30", f"data.train={shards}", f"run_dir={run_dir}"]
    return ["train", TINY, *settings, *overrides]


def at_step(step: int, rank: int, what: Callable[[], None]) -> Callable[[int], None]:
    """Plants `what` in the middle of that step of that rank."""

    def plant(me: int) -> None:
        real = speechllm.train.run_step

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if me == rank and kwargs["step"] == step:
                what()
            return real(*args, **kwargs)

        speechllm.train.run_step = faulty

    return plant


def fail() -> None:
    raise RuntimeError(FAULT)


def hang() -> None:
    time.sleep(1000)


def quick_watch() -> None:
    speechllm.failure.WATCH_EVERY = speechllm.failure.FOR_THE_LOOP = 0.3


def assert_told(ended: Ended, run_dir: Path, fault: str, code: int) -> None:
    """Once a launcher, as the last thing, and nothing else of a failure."""
    assert ended.codes == [code] * len(ended.codes)
    for log in [*ended.logs, (run_dir / "train.log").read_text()]:
        assert log.endswith(f"{fault}\n"), log
        assert log.count(fault) == 1, log
        assert "gloo" not in log, log
        assert "stopped by" not in log, log


@pytest.mark.distributed
@pytest.mark.parametrize("launchers", [((0, 1),), ((0,), (1,))], ids=["one_host", "two_hosts"])
def test_the_first_traceback_ends_every_log(
    tmp_path: Path, shards: Path, launchers: tuple[tuple[int, ...], ...]
) -> None:
    ranks = Ranks(
        tmp_path, command(tmp_path / "run", shards), launchers=launchers, plant=at_step(2, 1, fail)
    )
    ended = ranks.wait()
    assert_told(ended, tmp_path / "run", f"RuntimeError: {FAULT}", 1)
    assert all("rank 1 of 2 failed on" in log and "in faulty" in log for log in ended.logs)
    record = json.loads((tmp_path / "run" / "failures" / "rank_1.json").read_text())
    assert record["kind"] == "error"
    assert FAULT in record["text"]


def test_torchrun_takes_the_cause_for_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it finds all ranks ended at once, whose records all tell of the cause."""
    cause = Failure(1, "attempt", 1_700_000_000.9, "error", FAULT)
    failed = {}
    for rank in range(3):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        tell_torchrun(cause, rank)
        failed[rank] = ProcessFailure(rank, 100 + rank, 1, str(file))
    rank, first = ChildFailedError("speechllm", failed).get_first_failure()
    assert (rank, first.timestamp) == (1, 1_700_000_000)


@pytest.mark.distributed
def test_torchrun_ends_its_output_with_the_cause(tmp_path: Path, shards: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, speechllm.train\nfrom speechllm.cli import main\n"
        "def faulty(*args, **kwargs):\n    raise RuntimeError('the planted fault')\n"
        "if os.environ['RANK'] == '1':\n    speechllm.train.run_step = faulty\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script),
         *command(tmp_path / "run", shards)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert found.returncode == 1
    end = found.stderr.rstrip().rsplit("Root Cause (first observed failure):", 1)[1]
    assert "rank      : 1" in end
    assert end.rstrip("=\n ").endswith(f"RuntimeError: {FAULT}"), end
    assert (tmp_path / "run" / "train.log").read_text().endswith(f"RuntimeError: {FAULT}\n")


@pytest.mark.distributed
def test_after_kill_9_the_other_rank_says_so_and_the_same_command_goes_on(
    tmp_path: Path, shards: Path
) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run_dir = tmp_path / "run"
    killed = Ranks(tmp_path, command(run_dir, shards), plant=at_step(3, 1, die))
    ended = killed.wait()
    assert ended.codes == [1, -signal.SIGKILL]
    told = f"speechllm: rank 1 (process {killed.process(1)} on "
    for log in (*ended.logs, (run_dir / "train.log").read_text()):
        assert told in log.splitlines()[-2], log
        assert "was lost without a traceback" in log.splitlines()[-2], log
        assert "stopped by" not in log
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]
    again = Ranks(tmp_path / "again", command(run_dir, shards)).wait()
    assert again.codes == [0, 0], again.logs
    assert "resuming after step 2" in again.logs[0]
    assert list((run_dir / "failures").iterdir()) == []
    main(command(tmp_path / "whole", shards))
    found, expected = (
        load_file(find_checkpoint(run, prefer="last") / "trainable.safetensors")
        for run in (run_dir, tmp_path / "whole")
    )
    assert [x["loss"] for x in metrics(run_dir)] == pytest.approx(
        [x["loss"] for x in metrics(tmp_path / "whole")], rel=1e-5
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-4, rtol=0)


@pytest.mark.distributed
def test_the_users_error_on_one_rank_is_a_message_and_no_traceback(
    tmp_path: Path, shards: Path
) -> None:
    def wrong() -> None:
        raise DataError(FAULT)

    ended = Ranks(tmp_path, command(tmp_path / "run", shards), plant=at_step(1, 1, wrong)).wait()
    assert_told(ended, tmp_path / "run", f"speechllm: {FAULT}", 2)
    assert "Traceback" not in ended.logs[0]


@pytest.mark.distributed
def test_a_data_error_that_all_ranks_agree_on_is_told_once(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    corpus = open_corpus([str(shards)])
    for number in range(0, 24, 4):
        place = corpus.location(number)
        with open(place.shard, "r+b") as file:
            file.seek(place.audio_offset)
            file.write(b"\xff" * place.audio_size)
    ended = Ranks(tmp_path, command(tmp_path / "run", shards)).wait()
    assert ended.codes == [2, 2]
    told = "could not be used, more than data.max_bad_fraction=0.01 allows"
    assert ended.logs[0].count(told) == 1
    assert "Traceback" not in ended.logs[0]
    assert told in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.distributed
def test_a_rank_that_hangs_is_ended_when_another_has_failed(tmp_path: Path, shards: Path) -> None:
    def plant(rank: int) -> None:
        quick_watch()
        at_step(1, rank, fail if rank == 1 else hang)(rank)

    ended = Ranks(tmp_path, command(tmp_path / "run", shards), plant=plant).wait()
    assert_told(ended, tmp_path / "run", f"RuntimeError: {FAULT}", 1)


@pytest.mark.distributed
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, shards: Path) -> None:
    def plant(rank: int) -> None:
        quick_watch()
        at_step(1, 1, hang)(rank)

    ranks = Ranks(
        tmp_path,
        command(tmp_path / "run", shards, "collective_timeout=3"),
        plant=plant,
        ends_with=None,
    )
    ended = ranks.wait()
    assert ended.codes == [1, 1]
    assert f"rank 1 (process {ranks.process(1)} on" in ended.logs[0]
    assert "did not answer within collective_timeout" in ended.logs[0]
    assert "in hang" in ended.logs[0]  # where it was


@pytest.mark.distributed
def test_no_rank_leaves_before_the_checkpoint_of_a_stopped_run_is_written(
    tmp_path: Path, shards: Path
) -> None:
    """Some launchers kill the others as soon as one has ended with a code other than 0."""

    def plant(rank: int) -> None:
        write = CheckpointWriter._write

        def slow(*args: Any) -> None:
            time.sleep(1)
            write(*args)

        CheckpointWriter._write = slow  # type: ignore[method-assign]
        at_step(2, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))(rank)

    ended = Ranks(
        tmp_path,
        command(tmp_path / "run", shards, "train.checkpoint_every=100"),
        plant=plant,
        ends_with=signal.SIGKILL,
    ).wait()
    assert 99 in ended.codes
    assert find_checkpoint(tmp_path / "run").name == "step_00000003"


def test_a_wrong_configuration_is_told_once_a_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["train", TINY, "train.stepz=3"]) == 2
        told[local_rank] = capsys.readouterr().err
    assert "stepz" in told["0"]
    assert told["1"] == ""


def test_alone_the_exception_goes_on_and_the_log_has_it(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setattr(speechllm.train, "run_step", lambda *args, **kwargs: fail())
    with pytest.raises(RuntimeError, match=FAULT):
        train(tiny_config(tmp_path / "run", shards, "data.num_workers=0"), ALONE)
    assert (tmp_path / "run" / "train.log").read_text().endswith(f"RuntimeError: {FAULT}\n")
    assert FAULT in json.loads(error_file.read_text())["message"]["extraInfo"]["py_callstack"]
    with pytest.raises(DataError):
        train(tiny_config(tmp_path / "run", tmp_path / "none"), ALONE)
    assert "Traceback" not in (tmp_path / "run" / "train.log").read_text().splitlines()[-1]


def test_records_of_an_earlier_attempt_go(tmp_path: Path) -> None:
    old = tmp_path / "rank_3.json"
    old.write_text(json.dumps({"rank": 3, "attempt": "0", "time": 0, "kind": "user", "text": ""}))
    (tmp_path / "rank_4.json").write_text("{}")
    with FailureReport(tmp_path, ALONE):
        assert list(tmp_path.iterdir()) == []


def test_what_another_rank_caused_comes_last_whatever_the_clocks_say() -> None:
    late = Failure(1, "", 9.0, "error", "")
    early = Failure(0, "", 1.0, "contact", "")
    second = Failure(2, "", 9.5, "error", "")
    assert in_order([early, second, late]) == [late, second, early]


def test_each_launcher_has_one_speaker() -> None:
    places = [Place(host, 0, host) for host in "aabb"]
    failures = [Failure(3, "", 1.0, "error", ""), Failure(1, "", 2.0, "contact", "")]
    assert speaker(failures, places, "b") == 3
    assert speaker(failures, places, "a") == 1
    assert speaker(failures[:1], places, "a") is None

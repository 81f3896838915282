from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import TINY

from speechllm.cli import main
from speechllm.report.status import RunStatus


def test_a_run_in_one_row_and_as_json(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", TINY, f"run_dir={run}", f"data.train={shards}", "train.steps=2",
               "data.num_workers=0", f"data.validation={shards}", "evaluation.every=1",
               "evaluation.max_utterances=3"]  # fmt: skip
    assert main(command) == 0
    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["step"] == 2
    assert found["checkpoint"] == "step_00000002"
    assert found["best"]["score"] == pytest.approx(min(found["evaluation"]["loss"], 99), abs=1.0)
    assert main(["report", str(run)]) == 0
    assert "step_00000002" in capsys.readouterr().out


def test_what_is_no_number_is_null_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "loss": NaN}\n')
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1, "loss": Infinity}\n')
    assert main(["report", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail).values()
    assert (found["loss"], found["evaluation"]) == (None, {"step": 1, "loss": None})
    status = RunStatus(tmp_path, steps=2, world_size=1, lease=None)
    status.write("running", 1, loss=float("nan"))
    written = (tmp_path / "status.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["loss"] is None

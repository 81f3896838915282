from __future__ import annotations

import json
from pathlib import Path

from speechllm.report.lines import read_lines
from speechllm.report.metrics import Metrics


def test_a_resumed_run_cuts_what_it_will_do_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, from_step=0)
    for step in (1, 2, 3):
        metrics.training({"step": step, "loss": step / 10, "objective": "lm"})
    metrics.evaluation({"step": 3, "loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill in a write leaves it
    resumed = Metrics(tmp_path, from_step=2)
    resumed.training({"step": 3, "loss": 7.0, "objective": "lm"})
    resumed.close()
    found = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in found] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert read_lines(tmp_path / "evaluations.jsonl") == []
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": 1}) + '\n{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []

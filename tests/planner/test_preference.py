from __future__ import annotations

import json
from pathlib import Path

import torch

import pytest

from speechllm.planner.preference import machine_name, preferred, remembered_seconds


def test_the_usual_choice_stays_unless_another_is_a_tenth_faster() -> None:
    assert preferred("sdpa", {"eager": 0.95, "sdpa": 1.0}) == "sdpa"
    assert preferred("sdpa", {"eager": 0.90, "sdpa": 1.0}) == "eager"
    assert preferred("eager", {"eager": 0.90, "sdpa": 1.0}) == "eager"
    assert preferred("a", {"a": 2.0, "b": 1.5, "c": 1.0}) == "c"


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = iter([1.0, 2.0, 3.0])

    def measure() -> dict[str, float]:
        return {"eager": next(times)}

    assert remembered_seconds({"width": 576}, measure) == {"eager": 1.0}
    assert remembered_seconds({"width": 576}, measure) == {"eager": 1.0}
    assert remembered_seconds({"width": 960}, measure) == {"eager": 2.0}
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2
    assert {json.loads(file.read_text())["about"]["width"] for file in files} == {576, 960}
    for file in files:
        file.write_text("half a fi")
    assert remembered_seconds({"width": 576}, measure) == {"eager": 3.0}
    assert not list(tmp_path.rglob(".*"))


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "speechllm").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered_seconds({}, lambda: {"eager": 1.0}) == {"eager": 1.0}


def test_times_hold_for_a_machine_and_its_versions() -> None:
    about = machine_name(torch.device("cpu"))
    assert about["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in about["device"]

"""The benchmarks at sizes that take a moment; what is asserted is what they count, not how long."""

from __future__ import annotations

import json
from pathlib import Path

import bench_data
import bench_planning
import pytest


def test_simulated_ranks_are_balanced() -> None:
    small, medium, large = bench_planning.measure_ranks(30_000)
    assert [one["ranks"] for one in (small, medium, large)] == [8, 64, 1024]
    for one in (small, medium):
        assert one["padding"] < 0.01
        assert one["imbalance_mean"] < 1.03
        assert one["steps"] > 20


def test_planning_is_measured_in_processes_that_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_planning, "measure_ranks", lambda: [{"ranks": 8}])
    file = tmp_path / "result.json"
    options = ["--only", "planning", "--utterances", "9e3", "--json", str(file)]
    assert bench_data.main(options) == 0
    result = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == result
    (found,) = result["planning"]
    assert (found["utterances"], found["shards"]) == (9000, 3)
    assert found["steps"] > 50
    assert 1 < found["extra_rank_megabytes"] < 500


def test_all_contenders_decode_the_same_hours() -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    import bench_loading

    found = bench_loading.measure_loading(utterances=24, rounds=1, num_workers=[0])
    names = {"soundfile", "speechllm", "webdataset float32", "webdataset int16", "datasets"}
    assert set(found["contenders"]) == names
    seconds = [one["audio_seconds"] for one in found["contenders"].values()]
    assert seconds[0] > 0
    assert seconds == pytest.approx([seconds[0]] * len(names))

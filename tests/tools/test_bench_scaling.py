from __future__ import annotations

from pathlib import Path

import pytest
from bench_scaling import compare, fit_link, main, table

from speechllm.model.tiny import build_tiny_llm


def test_a_link_is_found_again() -> None:
    """Two ranks' all-reduces of n bytes take 2 alpha + n / B."""
    seconds = {n: 2 * 1e-4 + n / 5e8 for n in (8, 2**20, 2**22, 2**24)}
    link = fit_link(seconds)
    assert link.seconds == pytest.approx(1e-4, rel=1e-3)
    assert link.bytes_per_second == pytest.approx(5e8, rel=1e-3)


def test_predictions_beside_measurements(tmp_path: Path) -> None:
    build_tiny_llm(tmp_path / "llm")
    one = {"seconds": {"solo": 4.0, "ddp": 5.0}, "steps": {}}
    two = {
        "link": {"all_reduce": {n: 1e-3 + n / 5e8 for n in (64, 2**16, 2**20, 2**24)}},
        # The machine is slower by a tenth than it was for one, and two processes by a quarter.
        "seconds": {"solo": 4.4, "side_by_side": 5.5, "ddp": 3.5},
        "steps": {},
        "collectives": {"ddp": {"all_reduce": [3, 100]}},
    }
    found = compare(tmp_path, ["ddp"], one, two)
    row = found["strategies"]["ddp"]
    talk = row["communication_seconds"]
    assert 1e-3 < talk < 0.1
    assert row["one_process_seconds"] == pytest.approx(5.5)
    assert row["predicted_seconds"] == pytest.approx(5.5 / 2 + talk)
    assert row["predicted_side_by_side_seconds"] == pytest.approx(5.5 * 1.25 / 2 + talk)
    assert row["error"] == pytest.approx((2.75 + talk) / 3.5 - 1)
    assert row["collectives_counted"] == {"all_reduce": [3, 100]}
    assert row["collectives_predicted"]["all_reduce"][0] == 3
    assert f"{row['error']:+.1%}" in table(found)


def test_an_unknown_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--strategies", "ddp,zero9"])
    assert "zero9" in capsys.readouterr().err


def test_no_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_scaling.write_data", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps 0: give 1 or more" in capsys.readouterr().err

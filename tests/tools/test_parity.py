from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from safetensors.numpy import save_file

import parity
import pytest
from parity import FP32, LOW, Differences, compare, main, parse_arguments, within
from runs import TINY

from speechllm.errors import ConfigError


@pytest.mark.distributed
def test_a_tiny_configuration_trains_the_same(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [TINY, f"data.train={shards}", "data.num_workers=0", "--steps", "3", "--json"]
    assert main([*arguments, "--strategies", "fsdp2"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["steps"] == 3
    assert found["tolerance"]["max_loss_difference"] == 1e-5
    assert found["strategies"].keys() == {"fsdp2"}
    for values in found["strategies"].values():
        assert values["within_tolerance"]
        assert 0 <= values["max_loss_difference"] < 1e-5
        assert 0 <= values["max_weight_difference"] < 2e-4
    assert "fsdp2, fp32, 2 processes" in output.err


def leave_run(
    directory: Path, *, loss: float = 2.0, norm: float = 1.0, weight: float = 0.5
) -> Path:
    checkpoint = directory / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    save_file({"w": np.array([weight], dtype=np.float32)}, checkpoint / "trainable.safetensors")
    lines = [
        {"step": 1, "loss": 3.0, "grad_norm": 1.0},
        {"step": 2, "loss": loss, "grad_norm": norm},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def test_the_largest_differences_are_found(tmp_path: Path) -> None:
    alone = leave_run(tmp_path / "alone")
    found = compare(leave_run(tmp_path / "a", loss=2.5, norm=0.75, weight=0.0), alone, 2)
    assert found == Differences(loss=0.5, norm=0.25, weight=0.5)
    assert math.isnan(compare(leave_run(tmp_path / "b", norm=math.nan), alone, 2).norm)


def test_each_difference_has_its_tolerance() -> None:
    assert within(Differences(1e-6, 1e-6, 1e-5), FP32)
    assert not within(Differences(1e-4, 1e-6, 1e-5), FP32)
    assert not within(Differences(1e-6, 1e-4, 1e-5), FP32)
    assert not within(Differences(1e-6, 1e-6, 1e-3), FP32)
    assert not within(Differences(math.nan, 1e-6, 1e-5), FP32)
    assert within(Differences(1e-3, 1e-2, 1e-3), LOW)


@pytest.mark.parametrize("as_json", [True, False])
def test_what_differs_or_fails_is_said_and_is_exit_code_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    def train(options: object, run_dir: Path, overrides: list[str], **_: object) -> None:
        if overrides == ["strategy.kind=fsdp2"]:
            raise parity.Failed("out of luck")
        leave_run(run_dir, loss=2.0 if run_dir.name == "alone" else 2.1)

    monkeypatch.setattr(parity, "train", train)
    arguments = [TINY, "--steps", "2", "--strategies", "ddp", "fsdp2"]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 1
    output = capsys.readouterr()
    assert "out of luck" in output.err
    if as_json:
        strategies = json.loads(output.out)["strategies"]
        assert strategies["ddp"]["max_loss_difference"] == pytest.approx(0.1)
        assert not strategies["ddp"]["within_tolerance"]
        assert strategies["fsdp2"] == {"within_tolerance": False, "error": "out of luck"}
    else:
        assert "OUT OF TOLERANCE" in output.out
        assert "failed" in output.out


def test_wrong_input_is_refused_before_any_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"zero9: neither ddp, fsdp2, one of .*zero3"):
        main([TINY, "--strategies", "zero9"])
    with pytest.raises(ConfigError, match="train"):
        main([TINY, "--strategies", "ddp", "train.stepz=3"])
    with pytest.raises(SystemExit):
        parse_arguments([TINY, "--stepz", "3"])
    assert "--stepz" in capsys.readouterr().err


def test_a_configuration_that_does_not_train_at_all_is_wrong_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*_: object, **__: object) -> None:
        raise parity.Failed("no shards")

    monkeypatch.setattr(parity, "train", train)
    with pytest.raises(ConfigError, match="does not train in one process:\nno shards"):
        main([TINY])

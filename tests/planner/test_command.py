from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import ROOT, TINY

from speechllm.cli import main
from speechllm.config.load import load_config
from speechllm.planner.command import utterances_of
from speechllm.planner.memory import PARTS

LARGE = str(ROOT / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml")
NAMES = {"ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}


def test_json(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", LARGE, "--gpus", "8", "--gpu-memory", "24GB", "--nodes", "2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"strategies", "recommended", "max_batch_tokens"}
    assert set(found["strategies"]) == NAMES
    for entry in found["strategies"].values():
        assert set(entry) == {"fits", "bytes_per_rank", "bytes_on_wire_per_step", "parts"}
        assert set(entry["parts"]) == set(PARTS)
        assert sum(entry["parts"].values()) == entry["bytes_per_rank"]
    assert found["recommended"] == "ddp"
    assert found["max_batch_tokens"] > 3840


def test_table(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", LARGE, "--gpus", "8", "--gpu-memory", "24GB"]
    assert main([*command, "data.microbatch_tokens=2048"]) == 0
    found = capsys.readouterr().out
    assert "2121.9 M frozen and 35.16 M trained" in found
    assert "8 rank(s) of 24.0 GiB (GPU)" in found
    assert "microbatches of 2048 positions" in found
    assert "recommended: ddp (strategy.kind=ddp)" in found
    for name in NAMES:
        assert f"\n{name} " in found
    assert max(map(len, found.splitlines())) <= 120


def test_too_large_a_budget_says_so(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", LARGE, "--gpu-memory", "24GB", "data.microbatch_tokens=100000"]
    assert main(command) == 0
    assert "fits under no strategy" in capsys.readouterr().out
    assert main(["plan", LARGE, "--gpu-memory", "2GB"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_the_plain_path_is_told_in_utterances(
    offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", LARGE, "--gpu-memory", "24GB", "performance.preset=plain"]
    assert main(command) == 0
    found = capsys.readouterr().out
    assert "microbatches of 8 utterances, padded to 30 s" in found
    assert "performance.plain_utterances up to" in found
    assert "microbatch_tokens" not in found
    assert main([*command, "--json"]) == 0
    assert 8 <= json.loads(capsys.readouterr().out)["max_plain_utterances"] < 64


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--gpu-memory", "80XB"], "80XB"),
        (["--gpus", "0"], "--gpus 0"),
        (["--nodes", "0"], "nodes"),
    ],
)
def test_wrong_input(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, *options]) == 2
    assert word in capsys.readouterr().err


def test_an_unknown_model(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "model.llm.id=nobody/nothing"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_lengths_come_from_the_data_where_they_are(shards: Path) -> None:
    found, source = utterances_of(load_config(TINY, [f"data.train={shards}"]))
    assert source == "utterances as in data.train"
    assert max(u.samples for u in found) <= 2.1 * 16_000
    for overrides in ([], ["data.train=/nowhere"]):
        found, source = utterances_of(load_config(TINY, overrides))
        assert "assumed" in source
        assert max(u.samples for u in found) == 30 * 16_000

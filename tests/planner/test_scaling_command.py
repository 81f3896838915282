from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import pytest
from runs import ROOT, TINY

from speechllm.cli import main
from speechllm.config.load import load_config
from speechllm.model.build import audio_token_counter
from speechllm.planner.advice import Machine, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.command import training_here
from speechllm.planner.scaling_command import run_positions
from speechllm.training_data import epoch_plans

LARGE = str(ROOT / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml")
STEP = "data.microbatches_per_step=64"


def scaled(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main(["plan", *command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = scaled(capsys, LARGE, STEP, "--scale", "1,8,128", "--step-seconds", "32")
    assert found["strategy"] == "ddp"
    assert found["compute"]["microbatch"] == 0.5
    assert set(found["strategies"]) == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    one, eight, many = found["strategies"]["ddp"]["strong"]
    assert (one["step_seconds"], one["communication_seconds"], one["efficiency"]) == (32, 0, 1)
    assert eight["compute_seconds"] == 4
    assert eight["microbatches_per_rank"] == 8
    assert 0 < eight["exposed_communication_seconds"] < 0.1
    assert many["waste"] == 0.5
    assert many["efficiency"] < 0.5
    weak = found["strategies"]["ddp"]["weak"][2]
    assert weak["microbatches_per_step"] == 64 * 128
    assert weak["utterances_per_second"] > 100 * one["utterances_per_second"]
    assert found["sources"]["network"] == "preset, not measured"
    assert found["sources"]["overlap"] == "assumed"


def test_a_faster_network_and_hiding_help(
    offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [LARGE, STEP, "strategy.kind=fsdp2", "--step-seconds", "32", "--scale", "16"]
    seconds = [
        scaled(capsys, *command, *more)["strategies"]["fsdp2"]["strong"][0]["step_seconds"]
        for more in (
            ["--link", "pcie+eth10"],
            ["--link", "inter=25GB/s"],
            ["--link", "inter=25GB/s", "--overlap", "weights=0.5"],
            ["--link", "inter=25GB/s", "--gpus-per-node", "16"],
        )
    ]
    assert seconds[0] > 5 * seconds[1]
    assert seconds[1] > seconds[2] > 2
    assert seconds[3] < seconds[1]


def test_the_documents_example_is_what_is_printed(
    offline: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    example = document.partition("```\n$ speechllm ")[2].partition("```")[0].replace("\\\n", "")
    command, _, shown = example.partition("\n")
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_table(offline: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["plan", LARGE, STEP, "--scale", "--step-seconds", "32", "--gpu-memory", "80GB"]
    assert main([*command, "--json", str(tmp_path / "scaling.json")]) == 0
    found = capsys.readouterr().out
    assert json.loads((tmp_path / "scaling.json").read_text())["strategy"] == "ddp"
    for word in ("strong scaling: 64", "weak scaling: 64", "given (--step-seconds)",
                 "preset, not measured", "assumed", "\n1024 "):  # fmt: skip
        assert word in found
    assert found.count("yes") >= 22
    assert max(map(len, found.split("strong scaling")[1].splitlines())) <= 112


@pytest.mark.parametrize("chosen", ["prefix_cache=off", "prefix_cache=auto", "packing=on", "plain"])
def test_positions_that_the_llm_runs_on(shards: Path, chosen: str) -> None:
    overrides = ["preset=plain", "plain_utterances=3"] if chosen == "plain" else [chosen]
    config = load_config(TINY, [f"data.train={shards}", *(f"performance.{o}" for o in overrides)])
    split, text = training_here(config)
    assert split is not None
    assert text is not None
    job = job_of(config, read_architecture(config.model), Machine(1, 0, on_cpu=True))
    microbatches = epoch_plans(config, split)(0).step(0)
    found = run_positions(config, job, split, text, microbatches)
    prefix = 0 if chosen in ("plain", "prefix_cache=off") else len(text.prefix)
    chunk = audio_token_counter(config.model)(30 * 16_000)
    for numbers, positions in zip(microbatches, found, strict=True):
        rows = split.costs[numbers]
        if chosen == "plain":
            durations = split.corpus.durations[numbers]
            samples = np.rint(durations * 16_000).astype(np.int64)
            rows = rows - text.audio_tokens(samples) + chunk
        assert positions == len(numbers) * (rows.max() - prefix)


def test_overrides_may_follow_an_option_without_a_value(
    offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", LARGE, "--step-seconds", "32", "--scale", STEP, "--json"]
    assert main([*command, "strategy.kind=fsdp2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategy"] == "fsdp2"
    assert [row["gpus"] for row in found["strategies"]["ddp"]["strong"]][-1] == 1024


def test_a_runs_metrics(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"step_seconds": 1.1, "data_wait_seconds": 0.1, "utterances": 12}
    steps = [
        {"objective": "ctc", **line},
        {"objective": "lm", **line, "step_seconds": 9.0},
        *[{"objective": "lm", **line} for _ in range(10)],
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    data = f"data.train={shards}"
    found = scaled(capsys, TINY, data, "--scale", "1,2,3", "--measured", str(tmp_path))
    assert found["compute"] == {"microbatch": 0.5, "utterances": 6.0, "update": 0.0}
    assert "10 logged steps" in found["sources"]["compute"]
    one, two, three = found["strategies"]["ddp"]["strong"]
    assert one["utterances_per_second"] == pytest.approx(12)
    # Microbatches of real data differ in cost, so two ranks take a little more than half.
    assert two["balance"] == "data"
    assert 0.5 < two["compute_seconds"] < 0.7
    assert three["waste"] == pytest.approx(1 / 3)
    # The run says itself what its steps were made of.
    data = "data: {microbatches_per_step: 4, microbatch_tokens: 1024}"
    (tmp_path / "config.yaml").write_text(data)
    again = scaled(capsys, TINY, "--scale", "1", "--measured", str(file))
    assert again["compute"] == {"microbatch": 0.25, "utterances": 3.0, "update": 0.0}
    other = [TINY, "--scale", "--measured", str(file), "data.microbatch_tokens=99"]
    assert main(["plan", *other]) == 2
    assert "data.microbatch_tokens=1024" in capsys.readouterr().err
    (tmp_path / "status.json").write_text('{"world_size": 2}')
    assert main(["plan", TINY, "--scale", "--measured", str(file)]) == 2
    assert "2 ranks" in capsys.readouterr().err


def test_a_benchmark(tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    full = {
        "step_seconds": 2.0,
        "phases": {"load": 0.1, "optimizer": 0.3},
        "utterances": 80,
        "steps": 10,
        "settings": {"world": 1, "microbatches_per_step": 4, "microbatch_tokens": 3840},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"full": full}))
    found = scaled(capsys, LARGE, STEP, "--scale", "1", "--measured", str(file))
    assert found["compute"] == pytest.approx({"microbatch": 0.4, "utterances": 2.0, "update": 0.3})
    file.write_text(json.dumps({"full": full | {"settings": full["settings"] | {"world": 2}}}))
    assert main(["plan", LARGE, "--scale", "--measured", str(file)]) == 2
    assert "2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--scale"], "--measured FILE"),
        (["--scale", "--step-seconds", "0"], "more than 0"),
        (["--scale", "--step-seconds", "inf"], "more than 0, and a number"),
        (["--scale", "--measured", "/nowhere.json"], "cannot be read"),
        (["--scale", "--measured", TINY], "neither"),
        (["--scale", "1,x", "--step-seconds", "1"], "1,x"),
        (["--scale", "--step-seconds", "1", "--gpus", "8"], "--gpus-per-node"),
        (["--scale", "--step-seconds", "1", "--gpus-per-node", "0"], "1 or more"),
        (["--scale", "--step-seconds", "1", "--link", "token-ring"], "token-ring"),
        (["--scale", "--step-seconds", "1", "--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["--step-seconds", "1"], "only with --scale"),
        (["--link", "nvlink+ib200"], "only with --scale"),
    ],
)
def test_wrong_input(
    offline: None, options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", LARGE, *options]) == 2
    assert word in capsys.readouterr().err


def test_lines_that_are_no_metrics(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("[1, 2]\n")
    assert main(["plan", LARGE, "--scale", "--measured", str(file)]) == 2
    assert "neither a run's metrics.jsonl nor" in capsys.readouterr().err

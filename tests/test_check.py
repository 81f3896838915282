from __future__ import annotations

import re
from pathlib import Path

import pytest
from http_files import serve
from runs import TINY, metrics
from speech_files import write_shards

import speechllm.check
import speechllm.settle
from speechllm.cli import main


def test_ready(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = [TINY, f"data.train={shards}", f"run_dir={run}", "data.num_workers=0"]
    assert main(["check", *command]) == 0
    found = capsys.readouterr().out
    assert "48 utterances" in found
    padding = re.search("an epoch is 2 steps of 2 microbatches, padding [0-9.]+ %", found)
    assert padding
    assert "memory: 0.3 M frozen and 0.1 M trained" in found
    assert "would start anew" in found
    assert not run.exists(), "check writes nothing"
    assert main(["train", *command, "train.steps=1"]) == 0
    assert padding[0] in (run / "train.log").read_text()
    assert main(["check", *command]) == 0
    assert "would resume after step 1" in capsys.readouterr().out
    assert main(["check", *command, "data.window=7"]) == 2
    found = capsys.readouterr().out
    assert "MISSING  run_dir" in found
    assert "data.window: checkpoint 20000, this run 7" in found


def test_a_prompt_that_begins_with_the_audio(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["model.prompt.kind=plain", "model.prompt.texts=['{audio}']"]
    command = [TINY, f"data.train={shards}", f"run_dir={tmp_path / 'run'}", *plain]
    assert main(["check", *command]) == 0
    assert "advice   model.prompt.texts: '{audio}' begins with the audio" in capsys.readouterr().out
    assert main(["train", *command, "train.steps=1", "data.num_workers=0"]) == 0
    assert "begins with the audio" in (tmp_path / "run" / "train.log").read_text()


def test_a_choice_that_training_makes_is_not_foretold(
    tmp_path: Path,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["check", TINY, f"data.train={shards}", f"run_dir={tmp_path}", "precision=auto"]
    monkeypatch.setattr(speechllm.settle, "bf16_is_fast", lambda device: True)
    assert main([*command, "model.llm.attention=sdpa"]) == 0
    found = capsys.readouterr().out
    assert "precision: auto; here: bf16" in found
    assert "model.llm.attention" not in found
    monkeypatch.setattr(speechllm.settle, "is_small", lambda llm: False)
    monkeypatch.setattr(speechllm.check, "needs_checkpointing", lambda *args: True)
    assert main(command) == 0
    found = capsys.readouterr().out
    for key, choice in (("precision", "bf16"), ("model.llm.attention", "eager")):
        assert f"{key}: auto; training measures at its start; by rule here: {choice}" in found
    assert "train.activation_checkpointing: auto; here: true" in found


def test_everything_that_is_missing_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [
        "check", TINY, "model.encoder.id=openai/whisper-small.en",
        "model.llm.id=allenai/OLMo-2-0425-1B-Instruct",
    ]  # fmt: skip
    assert main(command) == 2
    found = capsys.readouterr().out
    for word in ("openai/whisper-small.en", "allenai/OLMo-2-0425-1B-Instruct", "run_dir"):
        assert word in found
    assert "not ready" in found


def test_missing_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TINY, f"run_dir={tmp_path}", f"data.train={tmp_path}"]) == 2
    found = capsys.readouterr().out
    assert "MISSING  data.train" in found
    assert "ok       weights" in found


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_without_byte_ranges_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranges: bool
) -> None:
    with serve(write_shards(tmp_path / "web", 4)) as files:
        files.ranges = ranges
        data = f"data.train={files.url}/train-000000.tar"
        assert main(["check", TINY, data, f"run_dir={tmp_path / 'run'}"]) == (0 if ranges else 2)
    refused = "MISSING  data.train: utt-00000 in http" in (found := capsys.readouterr().out)
    assert refused != ranges
    assert ("the server serves no byte ranges" in found) != ranges


def test_targets_that_ctc_cannot_align_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", 8)
    command = [TINY, f"run_dir={tmp_path / 'run'}", f"data.train={shards}", "data.num_workers=0"]
    coarse = [*command, "model.connector.downsampling_factor=64", "train.steps=1"]
    said = "8 of 8 utterances have more text tokens than audio tokens"
    assert main(["check", *coarse]) == 0
    assert said not in capsys.readouterr().out
    assert main(["check", *coarse, "train.ctc_steps=1"]) == 0
    assert said in capsys.readouterr().out
    assert main(["train", *coarse, "train.ctc_steps=1"]) == 0
    assert said in (tmp_path / "run" / "train.log").read_text()
    (step,) = metrics(tmp_path / "run")
    assert step["loss"] == 0


def test_weights_to_start_from_are_looked_for(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    command = [TINY, f"data.train={shards}", "data.num_workers=0", "train.steps=1"]
    start = [*command, f"run_dir={tmp_path / 'second'}", f"train.init_from={first}"]
    assert main(["check", *start]) == 2
    found = capsys.readouterr().out
    assert f"MISSING  train.init_from={first}: no complete checkpoint there" in found
    assert main(["train", *start]) == 2
    assert f"speechllm: train.init_from={first}: no complete" in capsys.readouterr().err
    assert main(["train", *command, f"run_dir={first}"]) == 0
    capsys.readouterr()
    assert main(["check", *start]) == 0
    assert f"train.init_from: would start from {first}/checkpoints/" in capsys.readouterr().out

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import pytest
import soundfile
from runs import TINY
from speech_files import tone

from speechllm.cli import main
from speechllm.transcribe import LONGEST, cut_at_pauses
from speechllm.types import SAMPLE_RATE


def test_short_audio_is_one_piece() -> None:
    samples = tone(3.0)
    (piece,) = cut_at_pauses(samples)
    assert (piece == samples).all()


def test_long_audio_is_cut_in_its_pauses_and_nothing_is_lost() -> None:
    samples = np.concatenate([tone(8.0, seed=i) for i in range(12)])
    pauses = [26.0, 50.0, 71.0]
    for pause in pauses:
        samples[int(pause * SAMPLE_RATE) : int((pause + 0.3) * SAMPLE_RATE)] = 0
    pieces = cut_at_pauses(samples)
    assert (np.concatenate(pieces) == samples).all()
    assert all(0 < len(piece) <= LONGEST for piece in pieces)
    ends = np.cumsum([len(piece) for piece in pieces])[:-1] / SAMPLE_RATE
    assert [any(p <= end <= p + 0.3 for p in pauses) for end in ends] == [True] * 3


def test_the_command_prints_text_for_files_of_any_kind(
    tmp_path: Path,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    training = [f"run_dir={run}", f"data.train={shards}", "train.steps=1", "data.num_workers=0"]
    assert main(["train", TINY, *training, "generation.max_new_tokens=3"]) == 0
    files = [str(tmp_path / "a.wav"), str(tmp_path / "b.flac")]
    soundfile.write(files[0], np.stack([tone(1.0, rate=44_100)] * 2, axis=1), 44_100)
    soundfile.write(files[1], tone(31.0), SAMPLE_RATE)
    capsys.readouterr()
    assert main(["transcribe", str(run), *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["audio"] for line in found] == files
    assert [line["duration"] for line in found] == pytest.approx([1.0, 31.0], abs=0.01)
    assert all(isinstance(line["text"], str) for line in found)
    assert main(["transcribe", str(run), files[0]]) == 0
    assert capsys.readouterr().out.strip() == found[0]["text"].strip()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["transcribe", str(run), files[0], "--set", "device=cuda"]) == 2
    assert "device: cuda" in capsys.readouterr().err, "the setting was not looked at"

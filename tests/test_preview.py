from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np

import pytest
import soundfile
from audio_tars import write_banks
from runs import TINY

from speechllm.cli import main


def read_png(path: Path) -> np.ndarray:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour) == (8, 0)
    (length,) = struct.unpack(">I", data[33:37])
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8)
    return lines.reshape(height, width + 1)[:, 1:]


def test_examples_of_everything_that_is_configured(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    banks = write_banks(tmp_path / "banks")
    command = [
        "check", TINY, f"data.train={shards}", f"run_dir={tmp_path / 'run'}",
        "--preview", str(tmp_path / "preview"),
        "data.augmentation.spec.probability=0.5", "data.augmentation.speed.probability=0.5",
        "data.augmentation.noise.probability=0.3",
        f"data.augmentation.noise.shards={banks / 'noise.tar'}",
    ]  # fmt: skip
    assert main(command) == 0
    assert "4 utterances with their augmentation" in capsys.readouterr().out
    index = json.loads((tmp_path / "preview" / "index.json").read_text())
    assert [entry["folder"] for entry in index] == ["00", "01", "02", "03"]
    assert [entry["key"] for entry in index] == [f"utt-000{n}" for n in ("00", "12", "24", "36")]
    for entry in index:
        folder = tmp_path / "preview" / entry["folder"]
        files = {name: example["files"] for name, example in entry["examples"].items()}
        assert files == {
            "original": ["original.wav", "original.png"],
            "speed": ["speed.wav"],
            "noise": ["noise.wav"],
            "spec": ["spec.png"],
            "together": ["together.wav", "together.png"],
        }
        assert {p.name for p in folder.iterdir()} == {f for names in files.values() for f in names}
        sounds = {n: soundfile.read(folder / f"{n}.wav", dtype="int16")[0] for n in
                  ("original", "speed", "noise", "together")}  # fmt: skip
        factor = entry["examples"]["speed"]["drawn"]["speed"]
        assert len(sounds["speed"]) == pytest.approx(len(sounds["original"]) / factor, abs=1)
        assert len(sounds["together"]) == len(sounds["speed"])
        assert len(sounds["noise"]) == len(sounds["original"])
        assert (sounds["noise"] != sounds["original"]).any()
        assert set(entry["examples"]["together"]["drawn"]) == {"speed", "noise", "spec"}
        spans = entry["examples"]["spec"]["drawn"]["spec"]
        assert len(spans["seconds"]) == len(spans["parts of the mel axis"]) == 2
        assert np.array(spans["seconds"]).max() <= len(sounds["original"]) / 16_000
        plain, masked = (read_png(folder / f"{name}.png") for name in ("original", "spec"))
        assert plain.shape == masked.shape == (80, 2 * -(-len(sounds["original"]) // 320))
    assert any(entry["epochs"]["0"] != entry["epochs"]["1"] for entry in index)
    changed = [
        (read_png(tmp_path / "preview" / e["folder"] / "spec.png")
         != read_png(tmp_path / "preview" / e["folder"] / "original.png")).mean()
        for e in index
    ]  # fmt: skip
    assert 0.02 < np.mean(changed) < 0.8


@pytest.mark.parametrize(
    ("prepare", "setting", "message"),
    [
        (lambda path: None, "seed=1", "data.augmentation is off"),
        (lambda path: path.mkdir(), "seed=1", "data.augmentation is off"),
        (
            lambda path: (path.mkdir(), (path / "x").touch()),
            "data.augmentation.gain.probability=1",
            "is not empty",
        ),
        (
            lambda path: path.touch(),
            "data.augmentation.gain.probability=1",
            "cannot be made (File exists); name a new directory",
        ),
    ],
)
def test_what_cannot_be_shown(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], prepare, setting, message
) -> None:
    prepare(tmp_path / "preview")
    command = ["check", TINY, f"data.train={shards}", f"run_dir={tmp_path}", setting]
    assert main([*command, "--preview", str(tmp_path / "preview")]) == 2
    assert message in capsys.readouterr().out

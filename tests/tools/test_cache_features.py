"""From shards to a training that does not run the encoder, and what it refuses on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cache_features import main
from runs import TINY, metrics, tiny_config
from speech_files import make_sample, write_shards

from speechllm.check import check
from speechllm.config.load import load_config
from speechllm.data.shards import write_shard
from speechllm.errors import ConfigError, UserError
from speechllm.features import read_features
from speechllm.model.encoder import WhisperFrames
from speechllm.prepare import prepare_text
from speechllm.train import train
from speechllm.training_data import epoch_plans, open_training, train_loader
from speechllm.world import connected

SETTINGS = (
    "train.steps=4", "data.num_workers=0", "evaluation.every=4", "evaluation.wer_utterances=2",
    "generation.max_new_tokens=2", "model.connector.dropout=0",
)  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Training shards, one of them empty, and one for validation in a directory of its own."""
    directory = write_shards(tmp_path / "train", 12, num_shards=3, seconds=(0.2, 0.8))
    write_shards(directory, 0, name="x")
    write_shards(tmp_path / "validation", 3, seconds=(0.2, 0.5))
    return directory


def data(shards: Path) -> list[str]:
    return [f"data.train={shards}", f"data.validation={shards.parent / 'validation'}"]


def features(shards: Path) -> list[str]:
    return sorted(path.name for path in shards.parent.rglob("*.bin"))


def run(run_dir: Path, shards: Path, *overrides: str) -> list[dict[str, Any]]:
    config = tiny_config(run_dir, shards, *data(shards)[1:], *SETTINGS, *overrides)
    with connected("cpu") as world:
        assert train(config, world) == 0
    return metrics(run_dir)


def test_training_goes_the_same_way_without_running_the_encoder(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shard(str(shards / "long.tar"), [make_sample("long", "longer than a chunk", 30.5)])
    usual = run(tmp_path / "usual", shards, "train.ctc_steps=1")
    assert main([TINY, *data(shards), "--dtype", "bf16", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["utterances"] == 16
    assert 0 < report["relative_rms_error"] < 3e-3
    assert report["break_even_epochs"] >= 1
    assert report["seconds"] > report["encoder_seconds"] > 0
    assert f"features-{report['key']}-bf16.bin" in capsys.readouterr().out
    assert len(features(shards)) == 6  # one beside each shard
    monkeypatch.setattr(WhisperFrames, "forward", None)
    cached = run(tmp_path / "cached", shards, "performance.encoder_cache=bf16", "train.ctc_steps=1")
    assert len(cached) == len(usual) == 4
    for one, other in zip(cached, usual, strict=True):
        for name in ("utterances", "audio_seconds", "target_tokens", "padding_fraction"):
            assert one[name] == other[name]
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_a_finished_shard_is_not_done_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [TINY, *data(shards), "--dtype", "int8", "--json", str(tmp_path / "r.json")]
    assert main([*command, "--dry-run"]) == 0
    assert features(shards) == []
    assert "5 of 5" in capsys.readouterr().out
    assert main([*command, "--task", "1", "--num-tasks", "2"]) == 0
    assert len(features(shards)) == 3
    assert main([*command, "--task", "2", "--num-tasks", "2"]) == 0
    assert len(features(shards)) == 5
    stamps = {p: p.stat().st_mtime_ns for p in shards.glob("*.bin")}
    assert main(command) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["utterances"], report["utterances_written_now"]) == (15, 0)
    assert report["break_even_epochs"] > 1  # as it was measured when they were written
    assert {p: p.stat().st_mtime_ns for p in shards.glob("*.bin")} == stamps
    capsys.readouterr()
    assert main([*command, "--overwrite", "--split", str(shards / "train-000000.tar")]) == 0
    changed = [p.name for p in stamps if p.stat().st_mtime_ns != stamps[p]]
    assert len(changed) == 1
    assert changed[0].startswith("train-000000.")
    assert main([*command, "model.encoder.context=pad30", "--dry-run", "--split", "train"]) == 0
    assert "4 of 4" in capsys.readouterr().out


def refused(shards: Path, *overrides: str) -> str:
    config = tiny_config(
        shards.parent / "run", shards, *data(shards)[1:], *SETTINGS,
        "performance.encoder_cache=int8", *overrides,
    )  # fmt: skip
    with pytest.raises(ConfigError) as error, connected("cpu") as world:
        train(config, world)
    found = check(config)
    assert not found.ready
    assert str(error.value) in "\n".join(found.lines)
    return str(error.value)


def test_what_cannot_be_read_is_refused_with_the_command_that_helps(shards: Path) -> None:
    message = refused(shards)
    assert "4 of 4 shards of data.train have no encoder outputs" in message
    assert "python tools/cache_features.py CONFIG --dtype int8" in message
    assert main([TINY, *data(shards), "--dtype", "int8"]) == 0
    assert "model.encoder.context trim, now pad30" in refused(shards, "model.encoder.context=pad30")
    assert main([TINY, *data(shards), "--dtype", "int8", "--split", "train"]) == 0
    (validation,) = shards.parent.glob("validation/*.bin")
    whole = validation.read_bytes()
    validation.write_bytes(whole[:-1])
    assert "holds no features, or is damaged" in refused(shards)
    validation.write_bytes(whole)
    shutil.rmtree(shards)
    write_shards(shards, 12, num_shards=3, seconds=(0.2, 0.8), seed=1)
    assert "3 of 3 shards of data.train" in refused(shards)


def test_frames_of_other_audio_are_stale(shards: Path) -> None:
    assert main([TINY, *data(shards), "--dtype", "int8"]) == 0
    write_shard(str(shards / "train-000001.tar"), [make_sample("new", "one", 0.4)])
    message = refused(shards)
    assert "1 of 4 shards of data.train" in message
    assert "is stale: it was written for other audio" in message
    assert main([TINY, *data(shards), "--dtype", "int8"]) == 0
    config = tiny_config(
        shards.parent / "run", shards, *data(shards)[1:], "performance.encoder_cache=int8"
    )
    assert "ok       data.train: int8 outputs of the encoder" in "\n".join(check(config).lines)
    text = prepare_text(config)
    split = open_training(config, text)
    loader = train_loader(config, split, text, epoch_plans(config, split), rank=0, world=1)
    assert loader.read(0, split.selection.kept[:2]).batch.frames is not None
    cached = read_features(config, split, "data.train")
    assert read_features(config, cached, "data.train") is cached


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.augmentation.spec.probability=1", "data.augmentation.spec changes"),
        ("data.augmentation.speed.probability=0.5", "data.augmentation.speed changes"),
        ("data.augmentation.gain.probability=0.5", "data.augmentation.gain changes"),
        ("model.unfreeze_encoder_layers=1", "model.unfreeze_encoder_layers trains it"),
        ("model.encoder.kind=fbank", "model.encoder.kind=fbank trains"),
        ("performance.preset=plain", "encoder_cache"),
    ],
)
def test_an_encoder_that_hears_something_else_every_time_is_refused(
    override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(TINY, ["performance.encoder_cache=bf16", override])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "3", "--num-tasks", "2"], "tasks are numbered 1 to 2"),
        (["--num-workers", "-1"], "--num-workers -1: must be a number above 0"),
        (["--batch-seconds", "nan"], "--batch-seconds nan: must be a number above 0"),
        (["data.train=[]"], "no shards: set data.train=DIR"),
        (["model.encoder.kind=fbank"], "only outputs of a frozen encoder"),
        (["model.encoder.id=random:llama"], "random:llama is a llama model, not a Whisper"),
        (["--split", "memory://x/a.tar"], "no such shard"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: list[str], message: str) -> None:
    shards = write_shards(tmp_path, 2, seconds=(0.1, 0.2))
    with pytest.raises(UserError, match=message):
        main([TINY, f"data.train={shards}", "--dtype", "bf16", *arguments])


def test_too_small_a_disk_is_seen_before(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shards)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"are needed, 1\.0 kB are free"):
        main([TINY, *data(shards), "--dtype", "bf16"])
    assert features(shards) == []

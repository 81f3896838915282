from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import pytest
import soundfile
from inspect_shards import main
from speech_files import make_sample, tone, write_shards

from speechllm.data.index import open_corpus
from speechllm.data.shards import write_shard
from speechllm.errors import UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    samples = [make_sample("a.1", "ahoj žluťoučký", 0.5), make_sample("b", "", 1.5, speaker="s")]
    write_shard(str(tmp_path / "x.tar"), samples)
    return tmp_path


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_summary(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary = as_json(capsys, str(directory))
    assert code == 0
    assert summary["shards"] == 1
    assert summary["bytes"] == (directory / "x.tar").stat().st_size
    assert summary["utterances"] == 2
    assert summary["hours"] == pytest.approx(2 / 3600)
    assert summary["seconds"] == {"min": 0.5, "median": 1.0, "mean": 1.0, "max": 1.5}
    assert summary["characters"]["max"] == 14
    assert summary["without_text"] == 1
    assert summary["histogram"]["0-1 s"] == summary["histogram"]["1-2 s"] == 1
    assert summary["characters_histogram"]["0-1"] == 1
    assert summary["characters_histogram"]["10-20"] == 1
    assert summary["characters_per_second_histogram"]["25-30"] == 1
    assert summary["sample_rates"] == {"16000": 2}
    assert summary["audio"] == {"flac": 2}
    assert summary["fingerprint"] == open_corpus([str(directory)]).fingerprint
    assert summary["samples"][0] == {
        "key": "a%2E1",
        "seconds": 0.5,
        "text": "ahoj žluťoučký",
        "fields": {"id": "a.1"},
    }


def test_a_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(directory), "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    for piece in ("16000: 2", "with empty text", "1-2 s", "a%2E1 (0.5 s): ahoj žluťoučký"):
        assert piece in shown
    assert "b (1.5 s)" not in shown


def test_an_empty_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(str(tmp_path / "x.tar"), [])
    code, summary = as_json(capsys, str(tmp_path), "--verify")
    assert (code, summary["utterances"], summary["problems"]) == (0, 0, [])
    assert main([str(tmp_path)]) == 0


def test_whole_shards_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, 6, num_shards=3, seconds=(0.1, 0.3))
    assert main([str(tmp_path), "--verify", "--num-workers", "2"]) == 0
    assert "verified: every tar fits its index" in capsys.readouterr().out


def test_damage_within_an_utterance_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, 2, seconds=(0.5, 0.6))
    tar = tmp_path / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    place = open_corpus([str(tar)]).location(1)
    middle = place.audio_offset + place.audio_size // 2
    data[middle : middle + 200] = bytes(200)
    tar.write_bytes(data)
    code, summary = as_json(capsys, str(tmp_path), "--verify")
    assert code == 2
    assert len(summary["problems"]) == 1
    assert summary["problems"][0].startswith(f"utt-00001 in {tar}: undecodable")
    assert main([str(tmp_path), "--verify"]) == 2
    assert f"error: utt-00001 in {tar}" in capsys.readouterr().err


def test_an_index_of_another_tar_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same size, same sampled headers, one more utterance in the tar than in the index."""
    names = [f"u{i:02d}" for i in range(20)]
    write_shard(str(tmp_path / "a.tar"), [make_sample(name, "x", 0.1) for name in names])
    renamed = (tmp_path / "a.tar").read_bytes()
    changed = bytearray(renamed)
    place = open_corpus([str(tmp_path / "a.tar")]).location(1)
    for offset in (place.audio_offset - 512, place.meta_offset - 512):
        header = changed[offset : offset + 512]
        header[2] += 1  # u01 -> u02
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        changed[offset : offset + 512] = header
    (tmp_path / "a.tar").write_bytes(changed)
    code, summary = as_json(capsys, str(tmp_path), "--verify")
    assert code == 2
    assert any("u01 in" in one and "not as the index says" in one for one in summary["problems"])
    assert any("second audio of one key" in one for one in summary["problems"])


def test_one_utterance_is_extracted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = directory / "one.wav"
    for key in ("a.1", "a%2E1"):
        assert main([str(directory), "--extract", key, "--to", str(target)]) == 0
        samples, rate = soundfile.read(target, dtype="int16")
        assert rate == 16000
        np.testing.assert_array_equal(samples, tone(0.5))
        target.unlink()
    assert "ahoj" in capsys.readouterr().out
    with pytest.raises(UserError, match="no utterance 'c'"):
        main([str(directory), "--extract", "c", "--to", str(target)])
    with pytest.raises(UserError, match="cannot be written"):
        main([str(directory), "--extract", "b", "--to", str(directory / "one.xyz")])
    with pytest.raises(SystemExit):
        main([str(directory), "--extract", "b"])


def test_a_target_with_a_slash_is_a_directory_there_or_not(directory: Path) -> None:
    command = [str(directory), "--extract", "b", "--to", f"{directory}/new/", "--overwrite"]
    assert main(command) == main(command) == 0
    assert [path.name for path in (directory / "new").iterdir()] == ["b.wav"]


def test_nothing_is_overwritten_unasked(directory: Path) -> None:
    target = directory / "one.wav"
    target.write_bytes(b"mine")
    command = [str(directory), "--extract", "b", "--to", str(target)]
    with pytest.raises(UserError, match=r"one\.wav: is there already"):
        main(command)
    assert target.read_bytes() == b"mine"
    assert main([*command, "--overwrite"]) == 0
    assert soundfile.info(target).frames == 24000


@pytest.mark.parametrize("key", ["../../evil", "/etc/evil", "a/b", "~x"])
def test_a_key_does_not_lead_out_of_the_directory(tmp_path: Path, key: str) -> None:
    """As keys of foreign tars may try to."""
    shards, target = tmp_path / "shards", tmp_path / "one" / "two"
    shards.mkdir()
    target.mkdir(parents=True)
    sample = make_sample("x", "text", 0.1)
    write_shard(str(shards / "a.tar"), [dataclasses.replace(sample, key=key)])
    before = set(tmp_path.rglob("*"))
    assert main([str(shards), "--extract", key, "--to", str(target)]) == 0
    (written,) = set(tmp_path.rglob("*")) - before
    assert written.parent == target
    np.testing.assert_array_equal(soundfile.read(written, dtype="int16")[0], tone(0.1))


def test_shards_without_index_are_refused(directory: Path) -> None:
    shutil.copy(directory / "x.tar", directory / "y.tar")
    with pytest.raises(UserError, match=r"y\.tar: has no index .*index_shards"):
        main([str(directory)])

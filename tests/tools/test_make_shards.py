from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_shards import main
from speech_files import write_corpus

from speechllm.data.index import open_corpus
from speechllm.data.store import Store

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


def test_shards_a_report_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_corpus(
        tmp_path / "in", 12, seconds=(0.1, 0.4), rate=44100, channels=2, extension="wav"
    )
    with open(manifest, "a") as file:
        file.write(json.dumps({"id": "lost", "audio": "lost.wav", "text": "x"}) + "\n")
    out = tmp_path / "out [1]"
    options = ["--shard-size", "50kB", "--num-workers", "2", "--seed", "3"]
    assert main([str(manifest), "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    corpus = open_corpus([str(out)])
    assert report["utterances"] == len(corpus) == 12
    assert report["shards"] == len(corpus.shards) > 1
    assert report["hours"] == pytest.approx(corpus.durations.sum() / 3600)
    assert report["settings"]["seed"] == 3
    assert report["encoded"] == 12
    assert report["sample_rates"] == {"16000": 12}
    assert report["dropped"] == {"missing": 1}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(one["line"], one["id"], one["reason"]) for one in dropped] == [(13, "lost", "missing")]
    shown = capsys.readouterr().out
    assert "dropped: missing" in shown
    assert str(out / "dropped.jsonl") in shown
    assert Store(corpus).read(0).fields["source"].startswith("audio/")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_corpus(tmp_path / "in", 5, seconds=(0.1, 0.3))
    options = ["--dry-run", "--max-seconds", "0.2", "--num-workers", "1"]
    assert main([str(manifest), "--out", str(tmp_path / "out"), *options]) == 0
    assert not (tmp_path / "out").exists()
    assert "dropped: too long" in capsys.readouterr().out


def test_sources_are_kept_or_encoded_as_told(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "in", 3, seconds=(0.1, 0.2), rate=8000, extension="wav")
    kinds = {}
    for option in ("--keep", "--reencode"):
        out = tmp_path / option
        assert main([str(manifest), "--out", str(out), option, "--num-workers", "1"]) == 0
        corpus = open_corpus([str(out)])
        kinds[option] = {corpus.location(i).audio_ext for i in range(3)}
    assert kinds == {"--keep": {"wav"}, "--reencode": {"flac"}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shard-size", "huge"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--keep", "--reencode"],
        ["--num-workers", "two"],
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["m.jsonl", "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_users_error_has_no_traceback(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "audio": "a.flac", "text": "x"}\nbroken\n')
    result = subprocess.run(
        [sys.executable, str(TOOL), str(manifest), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {manifest}:2: not JSON")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""

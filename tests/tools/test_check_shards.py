from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from check_shards import main
from make_shards import main as make_shards
from speech_files import make_sample, tone, write_corpus, write_shards

from speechllm.data.index import index_path, open_corpus
from speechllm.data.shards import write_shard
from speechllm.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "check_shards.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    manifest = write_corpus(directory / "in", 10, seconds=(0.2, 0.5))
    out = directory / "train"
    options = ["--shard-size", "30kB", "--num-workers", "1"]
    assert make_shards([str(manifest), "--out", str(out), *options]) == 0
    assert len(list(out.glob("*.tar"))) > 2
    return out


@pytest.fixture
def split(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "train"))


def check(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, dict[str, Any], list[tuple[str, str | None]]]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json", "--num-workers", "1"])
    values = json.loads(capsys.readouterr().out)
    return code, values, [(one["kind"], one["key"]) for one in values["findings"]]


@pytest.mark.parametrize("decode", ["none", "sample", "all"])
def test_whole_shards_are_clean(
    split: Path, decode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, values, found = check(capsys, split, "--decode", decode, "--sample", "1")
    assert (code, found) == (0, [])
    (one,) = values["splits"]
    shards = len(list(split.glob("*.tar")))
    assert (one["shards"], one["utterances"], one["has_dataset_json"]) == (shards, 10, True)
    assert one["decoded"] == {"none": 0, "sample": shards, "all": 10}[decode]
    assert main([str(split)]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_splits_keep_their_names_in_a_jobs_log(
    split: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "shards/of_a_corpus/with_a_long_name/train"
    monkeypatch.chdir(split.parent)
    Path(name).parent.mkdir(parents=True)
    split.rename(name)
    assert main([name, "--num-workers", "1"]) == 0
    assert name in capsys.readouterr().out


def first_tar(split: Path) -> Path:
    return min(split.glob("*.tar"))


def flip_a_byte(split: Path) -> None:
    """In the audio of the first utterance: header and index stay as they are."""
    tar = first_tar(split)
    place = open_corpus([str(tar)]).location(0)
    data = bytearray(tar.read_bytes())
    data[place.audio_offset + place.audio_size // 2] ^= 0x55
    tar.write_bytes(data)


def truncate(split: Path) -> None:
    os.truncate(first_tar(split), first_tar(split).stat().st_size // 2)


def change_behind_the_index(split: Path) -> None:
    other = make_sample("other", "text", 3.0)
    tar = str(first_tar(split))
    index = Path(index_path(tar)).read_bytes()
    write_shard(tar, [other])
    Path(index_path(tar)).write_bytes(index)


def remove_a_shard(split: Path) -> None:
    first_tar(split).unlink()


def remove_an_index(split: Path) -> None:
    Path(index_path(str(first_tar(split)))).unlink()


def add_a_shard(split: Path) -> None:
    write_shard(str(split / "more-000000.tar"), [make_sample("other", "text", 0.3)])


def leave_a_leftover(split: Path) -> None:
    (split / "train-000009.tar.tmp-12").write_bytes(b"half")


@pytest.mark.parametrize(
    ("damage", "kinds", "said"),
    [
        (flip_a_byte, {"checksum", "utterance"}, "sha256 differs"),
        (truncate, {"checksum", "index"}, "truncated"),
        (change_behind_the_index, {"checksum", "index"}, "stale"),
        (remove_a_shard, {"missing shard"}, "make or copy it again"),
        (remove_an_index, {"index"}, "has no index"),
        (add_a_shard, {"foreign shard"}, "another build"),
        (leave_a_leftover, {"leftover"}, "left over from a build"),
    ],
)
def test_a_planted_fault_is_found(
    split: Path,
    damage: Callable[[Path], None],
    kinds: set[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(split)
    code, values, found = check(capsys, split, "--decode", "all")
    assert code == 1
    assert {kind for kind, _ in found} == kinds
    assert any(said in one["detail"] for one in values["findings"])
    assert sum(values["findings_by_kind"].values()) == len(found)
    assert main([str(split), "--num-workers", "2", "--decode", "all"]) == 1
    assert said in capsys.readouterr().err


def test_a_build_that_is_not_finished_is_found(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half"
    command = [str(built.parent / "in/train.jsonl"), "--out", str(out), "--num-workers", "1"]
    command += ["--shard-size", "30kB"]
    assert make_shards([*command, "--task", "1", "--num-tasks", "2"]) == 0
    code, values, found = check(capsys, out)
    assert (code, found) == (1, [("unfinished", None)])
    assert "shards are made and there is no dataset.json" in values["findings"][0]["detail"]
    assert make_shards([*command, "--task", "2", "--num-tasks", "2"]) == 0
    assert make_shards([*command, "--check-complete"]) == 0
    assert check(capsys, out)[0] == 0


def test_foreign_shards_are_checked_without_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, 4, num_shards=2, seconds=(0.2, 0.3))
    code, values, found = check(capsys, tmp_path)
    assert (code, found) == (0, [])
    assert values["splits"][0]["has_dataset_json"] is False
    write_shard(str(tmp_path / "again.tar"), [make_sample("utt-00001", "x", 0.2)])
    code, values, found = check(capsys, tmp_path)
    assert (code, found) == (1, [("repeated id", "utt-00001")])


LONG = "turn on the light in the kitchen"


@pytest.fixture
def splits(tmp_path: Path) -> tuple[Path, Path]:
    """Clean splits, with short texts in common."""
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / name).mkdir()
        samples = [
            make_sample(f"{name}-{i}", f"yes {name} {i} and so on", 0.2, seed=9 * seed + i)
            for i in range(3)
        ]
        samples.append(make_sample(f"{name}-yes", "yes", 0.2, seed=9 * seed + 8))
        write_shard(str(tmp_path / name / "a.tar"), samples)
    return tmp_path / "train", tmp_path / "test"


def test_clean_splits_leak_nothing(
    splits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(capsys, *splits)[0] == 0
    code, _, found = check(capsys, *splits, "--min-leak-words", "1")
    assert (code, found) == (1, [("leak by text", "test-yes")])
    assert check(capsys, *splits, "--min-leak-words", "1", "--leaks", "id,audio")[0] == 0


def test_leaks_are_found_by_id_text_and_audio(
    splits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = splits
    write_shard(
        str(train / "b.tar"),
        [
            make_sample("a/1.x", "an utterance of its own here", 0.3, seed=50),
            make_sample("words", f"  {LONG.title()}!", 0.4, seed=51),
            make_sample("sound", "some words or other to say", 0.5, seed=52),
        ],
    )
    # The same audio as another kind of file, under another id.
    soundfile.write(test / "sound.wav", tone(0.5, seed=52), 16000)
    (test / "sound.txt").write_text("quite other words are said here")
    subprocess.run(["tar", "-cf", "c.tar", "sound.wav", "sound.txt"], cwd=test, check=True)
    write_shard(
        str(test / "b.tar"),
        [
            make_sample("a/1.x", "not the words of the other", 0.31, seed=60),
            make_sample("other-words", LONG, 0.41, seed=61),
        ],
    )
    assert subprocess.run([sys.executable, TOOL.parent / "index_shards.py", test]).returncode == 0
    renamed = test / "c.tar"
    code, values, found = check(capsys, train, test, "--decode", "none")
    assert code == 1
    assert set(found) == {
        ("leak by id", "a%2F1%2Ex"),
        ("leak by text", "other-words"),
        ("leak by audio", "sound"),
        ("leak by id", "sound"),
    }
    assert any(one["where"] == str(renamed) for one in values["findings"])
    code, _, found = check(capsys, train, test, "--leaks", "none")
    assert (code, found) == (0, [])


def test_wrong_usage_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no \*\.tar there"):
        main([str(tmp_path)])
    for wrong in (["--leaks", "speaker"], ["--sample", "0"], ["--decode", "half"]):
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path), *wrong])
        assert stopped.value.code == 2
    capsys.readouterr()
    result = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr

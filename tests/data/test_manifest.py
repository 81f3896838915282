from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from speechllm.data.manifest import Entry, parse_line, read_manifest, source_path
from speechllm.errors import DataError

GOOD = {"id": "a", "audio": "a.flac", "text": "hello"}


def write(path: Path, *lines: dict[str, Any] | str) -> str:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def test_a_manifest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "my.train.jsonl", "\ufeff" + json.dumps(GOOD), "", {**GOOD, "id": "b"})
    manifest = read_manifest(path)
    assert manifest.ids == ["a", "b"]
    assert manifest.line_numbers.tolist() == [1, 3]
    assert [json.loads(manifest.line(i))["id"] for i in range(2)] == ["a", "b"]
    assert manifest.name == "my.train"
    assert manifest.directory == str(tmp_path)


def test_windows_line_ends_and_gzip(tmp_path: Path) -> None:
    lines = (json.dumps(GOOD) + "\r\n" + json.dumps({**GOOD, "id": "b"}) + "\r\n").encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    manifest = read_manifest(str(path))
    assert manifest.ids == ["a", "b"]
    assert manifest.name == "a"


def test_a_line_becomes_an_entry() -> None:
    values = {**GOOD, "text": " ž ", "start": 1, "end": 2.5, "channel": 1, "speaker": "s", "x": [1]}
    assert parse_line(json.dumps(values).encode(), "m:1") == Entry(
        "a", "a.flac", "ž", 1.0, 2.5, 1, {"speaker": "s", "x": [1]}
    )
    assert parse_line(json.dumps(values).encode(), "m:1").is_cut
    assert not parse_line(json.dumps({**GOOD, "start": None}).encode(), "m:1").is_cut


@pytest.mark.parametrize("text", [{}, {"text": None}, {"text": ""}, {"text": " \n"}])
def test_missing_text_is_left_to_be_counted(text: dict[str, Any]) -> None:
    values = {"id": "a", "audio": "a.flac", **text}
    assert parse_line(json.dumps(values).encode(), "m:1").text is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7", "not a JSON object"),
        ({"audio": "a", "text": "x"}, "`id` must be a string"),
        ({**GOOD, "id": 7}, "`id` must be a string"),
        ({**GOOD, "id": ""}, "`id` must be a string"),
        ({**GOOD, "id": "\ud800"}, "`id` is not Unicode"),
        ({"id": "a", "text": "x"}, "`audio` must be a string"),
        ({**GOOD, "text": 7}, "`text` must be a string, not 7"),
        ({**GOOD, "start": "1"}, "`start` must be a number of seconds"),
        ({**GOOD, "end": True}, "`end` must be a number of seconds"),
        ('{"id": "a", "audio": "a", "text": "x", "end": NaN}', "`end` must be a number of seconds"),
        ({**GOOD, "start": -1}, "`start` is negative"),
        ({**GOOD, "channel": 1.5}, "`channel` must be 0, 1"),
        ({**GOOD, "channel": -1}, "`channel` must be 0, 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    path = write(tmp_path / "m.jsonl", {**GOOD, "id": "first"}, line)
    with pytest.raises(DataError, match=rf"m\.jsonl:2: .*{message}"):
        read_manifest(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"id": "a", "audio": "a", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:1: not JSON .*utf-8"):
        read_manifest(str(path))


def test_an_id_twice_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD)
    with pytest.raises(DataError, match="id 'a' is on line 1 and on line 3"):
        read_manifest(path)


def test_missing_and_empty_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        read_manifest(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"m\.jsonl: no lines"):
        read_manifest(write(tmp_path / "m.jsonl", "", ""))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz: cannot be read"):
        read_manifest(str(tmp_path / "bad.jsonl.gz"))


def test_where_audio_is_found() -> None:
    assert source_path("/data", "wav/a.wav") == "/data/wav/a.wav"
    assert source_path("/data", "/other/a.wav") == "/other/a.wav"
    assert source_path("/data", "s3://b/a.wav") == "s3://b/a.wav"
    assert source_path("s3://b/set", "a.wav") == "s3://b/set/a.wav"

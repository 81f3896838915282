from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

import pytest
from source_files import Corpus, write_lines, write_tone

from speechllm.data.sources.utterance import FileAudio, SourceUtterance
from speechllm.errors import DataError

GOOD = {"id": "a", "audio": "a.flac", "text": "hello"}


def write(path: Path, *lines: dict[str, Any] | str) -> str:
    return f"jsonl:{write_lines(path, lines)}"


def test_a_manifest_is_read(tmp_path: Path) -> None:
    spec = write(tmp_path / "my.train.jsonl", "\ufeff" + json.dumps(GOOD), "", {**GOOD, "id": "b"})
    manifest = Corpus(spec).manifest
    assert list(manifest.ids) == ["a", "b"]
    assert manifest.line_numbers.tolist() == [1, 3]
    assert manifest.name == "my.train"
    assert manifest.directory == str(tmp_path)


def test_windows_line_ends_and_gzip(tmp_path: Path) -> None:
    lines = (json.dumps(GOOD) + "\r\n" + json.dumps({**GOOD, "id": "b"}) + "\r\n").encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    manifest = Corpus(f"jsonl:{path}").manifest
    assert list(manifest.ids) == ["a", "b"]
    assert manifest.name == "a"


def test_a_line_becomes_an_utterance(tmp_path: Path) -> None:
    values = {**GOOD, "text": " ž ", "start": 1, "end": 2.5, "channel": 1, "speaker": "s", "x": [1]}
    whole = {**GOOD, "id": "b", "start": None}
    corpus = Corpus(write(tmp_path / "m.jsonl", values, whole))
    fields = {"speaker": "s", "x": [1]}
    assert corpus["a"] == SourceUtterance("a", FileAudio("a.flac"), "ž", 1.0, 2.5, 1, fields)
    assert corpus["a"].is_cut
    assert not corpus["b"].is_cut


@pytest.mark.parametrize("text", [{}, {"text": None}, {"text": ""}, {"text": " \n"}])
def test_missing_text_is_left_to_be_counted(tmp_path: Path, text: dict[str, Any]) -> None:
    corpus = Corpus(write(tmp_path / "m.jsonl", {"id": "a", "audio": "a.flac", **text}))
    assert corpus["a"].text is None


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
        ({**GOOD, "start": "x"}, "`start` must be a number of seconds"),
        ({**GOOD, "start": 10**400}, "`start` must be a number of seconds"),
        ({**GOOD, "end": 1e300}, "`end` must be a number of seconds"),
        ({**GOOD, "end": True}, "`end` must be a number of seconds"),
        ('{"id": "a", "audio": "a", "text": "x", "end": NaN}', "`end` must be a number of seconds"),
        ({**GOOD, "start": -1}, "`start` is negative"),
        ({**GOOD, "channel": 1.5}, "`channel` must be 0, 1"),
        ({**GOOD, "channel": -1}, "`channel` must be 0, 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    spec = write(tmp_path / "m.jsonl", {**GOOD, "id": "first"}, line)
    with pytest.raises(DataError, match=rf"m\.jsonl:2: .*{message}"):
        Corpus(spec)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"id": "a", "audio": "a", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:1: not JSON .*utf-8"):
        Corpus(f"jsonl:{path}")
    path.write_bytes(b"id,audio,text\na,a,\xff\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2: not UTF-8"):
        Corpus(f"csv:{path}")


def test_an_id_twice_names_both_lines(tmp_path: Path) -> None:
    spec = write(tmp_path / "m.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD)
    with pytest.raises(DataError, match="id 'a' is on line 1 and on line 3"):
        Corpus(spec)


def test_missing_and_empty_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        Corpus(f"jsonl:{tmp_path}/nowhere.jsonl")
    with pytest.raises(DataError, match=r"m\.jsonl: no lines"):
        Corpus(write(tmp_path / "m.jsonl", "", ""))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz: cannot be read"):
        Corpus(f"jsonl:{tmp_path}/bad.jsonl.gz")
    (tmp_path / "m.csv").write_text("")
    with pytest.raises(DataError, match=r"m\.csv: no lines"):
        Corpus(f"csv:{tmp_path}/m.csv")


def test_a_manifest_as_nemo_writes_it(tmp_path: Path) -> None:
    line = {
        "audio_filepath": "wav/x.wav",
        "duration": 0.5,
        "offset": 0.25,
        "text": "t",
        "lang": "cs",
    }
    whole = {"audio_filepath": "wav/y.wav", "duration": 1.0, "text": "u"}
    columns = "audio=audio_filepath,start=offset,duration=duration,ids=audio"
    samples = write_tone(tmp_path / "wav/x.wav", 1.0)
    corpus = Corpus(write(tmp_path / "m.jsonl", line, whole) + f",{columns}")
    one = corpus["wav/x-0000250-0000750"]
    assert (one.start, one.end, one.fields) == (0.25, 0.75, {"lang": "cs"})
    np.testing.assert_array_equal(corpus.samples(one.id), samples[4000:12000])
    assert not corpus["wav/y"].is_cut


def test_a_csv_with_quotes_and_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(
        'utt;file;words;start;end;channel;speaker\n"a";x.wav;"said ""so; ""\n on";0.5;1;1;s\n\n'
        "b;y.wav;other;;;;\n"
    )
    corpus = Corpus(f"csv:{path},delimiter=;,id=utt,audio=file,text=words,root=/data")
    fields = {"speaker": "s"}
    assert corpus["a"] == SourceUtterance(
        "a", FileAudio("x.wav"), 'said "so; "\n on', 0.5, 1.0, 1, fields
    )
    assert corpus["b"] == SourceUtterance("b", FileAudio("y.wav"), "other")
    assert corpus.access.roots == ("/data",)


def test_a_tsv_keeps_its_quotes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.tsv.gz", ["id\taudio\ttext", 'a\tx.wav\t"Hi", he said'])
    corpus = Corpus(f"tsv:{path}")
    assert corpus.texts == {"a": '"Hi", he said'}
    assert corpus.manifest.name == "m"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("id,audio\na,b\n", "", r"m\.csv: no column `text`; its columns are id, audio; .*text="),
        ("audio,text\na,b\n", "", r"no column `id`; .*ids=audio"),
        ("id,audio,text\n", ",text=words", "no column `words`"),
        ("id,audio,text\n", ",start=from", "no column `from`"),
        ("id,audio,text\n", ",duration=length", "no column `length`"),
        ("id,audio,text\na,b\n", "", r"m\.csv:2: 2 cells, but the header names 3"),
        ("id,audio,text,end\na,b,c,x\n", "", r"m\.csv:2: `end` must be a number"),
        ("id,audio,text,channel\na,b,c,left\n", "", r"m\.csv:2: `channel` must be 0, 1"),
        ('id,audio,text\na,b,"c\n', "", r"m\.csv:2: not csv"),
        ("id,audio,text\n", "", r"m\.csv: no lines"),
        ("id,audio,text\na,b,c\n", ",delimiter=xy", "give one character"),
        ("id,audio,text\na,b,c\n", ",ids=guess", "ids=guess: give one of column, audio"),
        ("id,audio,text\na,b,c\n", ",lang=cs", "a csv source has no option 'lang'"),
    ],
)
def test_what_is_wrong_with_a_csv(tmp_path: Path, content: str, options: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        Corpus(f"csv:{tmp_path}/m.csv{options}")

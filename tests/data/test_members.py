from __future__ import annotations

import pytest

from speechllm.data.members import AudioMember, MetadataMember, clean_name, pair, parse_metadata
from speechllm.errors import DataError


def rows_of(*names: str) -> tuple[list[tuple[str, str, str]], dict[str, list[str]]]:
    audios, metadata = [], []
    for offset, name in enumerate(names):
        if name.endswith((".json", ".txt", ".text")):
            metadata.append(MetadataMember(name, offset, 1, 1))
        else:
            audios.append(AudioMember(name, offset, 1, 1.0, 16000))
    rows, left_over = pair(audios, metadata)
    return [(row.key, row.audio.name, row.metadata.name) for row in rows], left_over


@pytest.mark.parametrize(
    ("name", "clean"),
    [("./a/b.flac", "a/b.flac"), ("a//b.flac", "a/b.flac"), ("/a.flac", "a.flac"), ("", "")],
)
def test_names_are_cleaned(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_members_of_a_key_need_not_be_neighbours() -> None:
    rows, left_over = rows_of("b.txt", "a.flac", "b.flac", "a.json")
    assert rows == [("a", "a.flac", "a.json"), ("b", "b.flac", "b.txt")]
    assert left_over == {}


def test_dots_in_names_belong_to_the_key_where_that_pairs() -> None:
    rows, _ = rows_of("u.1.flac", "u.2.flac", "u.1.txt", "u.2.txt")
    assert [row[0] for row in rows] == ["u.1", "u.2"]


def test_otherwise_the_key_ends_at_the_first_dot() -> None:
    rows, left_over = rows_of("d.x/7.audio.flac", "d.x/7.meta.json")
    assert rows == [("d.x/7", "d.x/7.audio.flac", "d.x/7.meta.json")]
    assert left_over == {}


def test_json_wins_over_text_and_the_first_audio_over_the_second() -> None:
    rows, left_over = rows_of("a.txt", "a.wav", "a.flac", "a.json")
    assert rows == [("a", "a.wav", "a.json")]
    assert left_over == {"second audio of one key": ["a.flac"]}


def test_keys_stay_unique_over_both_rules() -> None:
    rows, _ = rows_of("a.flac", "a.json", "a.x.wav", "a.y.json")
    assert [row[0] for row in rows] == ["a"]


def test_members_without_partner_are_named() -> None:
    rows, left_over = rows_of("a.flac", "b.json")
    assert rows == []
    assert left_over == {"audio without metadata": ["a.flac"], "metadata without audio": ["b.json"]}


def test_metadata_of_both_kinds() -> None:
    assert parse_metadata(b'{"text": " a b ", "lang": "en"}', "json") == ("a b", {"lang": "en"})
    assert parse_metadata("\ufeffžluť\n".encode(), "txt") == ("žluť", {})
    assert parse_metadata(b"", "text") == ("", {})
    assert parse_metadata(b'{"text": "\\ud83d\\ude00"}', "json") == ("\N{GRINNING FACE}", {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "no `text`"),
        (b'{"text": 7}', "no `text`"),
        (b'["text"]', "no `text`"),
        (b'{"text": "a \\ud800"}', "not Unicode"),
        (b'{"text": "a", "prompt": "\\uDFFF"}', "not Unicode"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_metadata(data, "json")

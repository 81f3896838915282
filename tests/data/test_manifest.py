from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechllm.data.manifest import Ids, Manifest, ManifestBuilder
from speechllm.data.sources.utterance import (
    Access,
    AudioRef,
    CommandAudio,
    FileAudio,
    RowAudio,
    SliceAudio,
    SourceUtterance,
    decode_line,
    encode_line,
    source_name,
)
from speechllm.errors import DataError


def build(*names: str) -> Manifest:
    builder = ManifestBuilder()
    builder.begin("m.jsonl", "/data")
    for number, name in enumerate(names, 1):
        builder.add(number, SourceUtterance(name, FileAudio("a.flac"), "x"))
    return builder.finish("m", Access(()))


@given(names=st.lists(st.text("aéž😀", min_size=1), unique=True))
def test_ids_are_a_sequence_of_strings(names: list[str]) -> None:
    ids = build(*names).ids
    assert isinstance(ids, Ids)
    assert list(ids) == names
    assert [ids[i] for i in range(len(names))] == names
    assert ids[1:] == names[1:]
    if names:
        assert ids[-1] == names[-1]
    with pytest.raises(IndexError):
        ids[len(names)]


def test_lines_are_found_by_number() -> None:
    manifest = build("a", "b", "c")
    assert [json.loads(manifest.line(i))["id"] for i in range(3)] == ["a", "b", "c"]
    assert manifest.line_numbers.tolist() == [1, 2, 3]
    assert manifest.bounds.shape == (3, 2)
    assert (manifest.path, manifest.directory) == ("m.jsonl", "/data")


@given(names=st.lists(st.text("abc", min_size=1), min_size=1))
def test_only_distinct_ids_are_taken(names: list[str]) -> None:
    if len(set(names)) == len(names):
        assert len(build(*names)) == len(names)
        return
    with pytest.raises(DataError, match=r"m\.jsonl: id '.*' is on line .* and on line"):
        build(*names)


@pytest.mark.parametrize(("name", "message"), [("", "an empty id"), ("\ud800", "is not Unicode")])
def test_wrong_ids_are_named(name: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"m\.jsonl:2: .*{message}"):
        build("a", name)


@pytest.mark.parametrize(
    ("audio", "source"),
    [
        (FileAudio("a/ž.flac"), "a/ž.flac"),
        (SliceAudio("x.ark", 7, None, "wav"), "x.ark:7"),
        (SliceAudio("x.tar", 512, 100, "flac"), "x.tar:512"),
        (CommandAudio("sox a |b"), "sox a |b |"),
        (RowAudio("x.arrow", 3, "audio", "flac"), "x.arrow:3"),
    ],
)
def test_every_audio_survives_its_line(audio: AudioRef, source: str) -> None:
    one = SourceUtterance("i", audio, "ž", 0.5, 1.5, 1, {"start": 7, "deep": {"a": [None]}}, 3.5, 2)
    assert decode_line(encode_line(one, 2)) == one
    assert source_name(audio) == source


def test_text_is_stripped_and_half_a_surrogate_kept_for_later() -> None:
    for text, wanted in ((" a ", "a"), (" \n", None), (None, None), ("\ud800", "\ud800")):
        one = SourceUtterance("i", FileAudio("a"), text)
        assert decode_line(encode_line(one, 0)).text == wanted

from __future__ import annotations

from pathlib import Path

import pytest
from source_files import Corpus, write_lines, write_tone

from speechllm.data.prepare import PrepareSettings, prepare
from speechllm.errors import DataError


def line(name: str) -> dict[str, str]:
    return {"id": name, "audio": f"{name}.flac", "text": "x", "lang": "de"}


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for folder in ("one", "two"):
        write_lines(tmp_path / folder / "m.jsonl", [line("a"), line("b")])
        write_tone(tmp_path / folder / "a.flac", 0.2 if folder == "one" else 0.4)
    return [f"jsonl:{tmp_path}/{folder}/m.jsonl" for folder in ("one", "two")]


def test_sources_are_joined_each_with_its_own_root(two: list[str]) -> None:
    corpus = Corpus(two[0], f"{two[1]},prefix=2/,set.task=st,set.lang=cs,limit=1")
    assert list(corpus.utterances) == ["a", "b", "2/a"]
    assert corpus["a"].fields == {"lang": "de"}
    assert corpus["2/a"].fields == {"lang": "cs", "task": "st"}
    assert (len(corpus.samples("a")), len(corpus.samples("2/a"))) == (3200, 6400)
    assert corpus.manifest.name == "m+1"
    assert corpus.manifest.path.split(", ") == [one.partition(":")[2] for one in two]
    assert Corpus(*two[:1], name="mine").manifest.name == "mine"


def test_an_id_in_two_sources_names_both(two: list[str]) -> None:
    message = r"id 'a' is both in .*one/m\.jsonl:1 and in .*two/m\.jsonl:1; .*prefix="
    with pytest.raises(DataError, match=message):
        Corpus(*two)


def test_where_a_corpus_lies_does_not_change_its_hash(two: list[str], tmp_path: Path) -> None:
    one, other = (Corpus(spec).manifest for spec in two)
    assert one.sha256 == other.sha256
    write_lines(tmp_path / "two/m.jsonl", [line("a"), line("c")])
    assert Corpus(two[1]).manifest.sha256 != one.sha256


def test_a_column_text_does_not_take_the_place_of_the_one_that_was_chosen(two: list[str]) -> None:
    path = two[0].partition(":")[2]
    write_lines(Path(path), [{**line("a"), "text": "It's 5.", "normalized": "it is five"}])
    corpus = Corpus(f"jsonl:{path},text=normalized")
    assert corpus["a"].text == "it is five"
    assert prepare(corpus["a"], corpus.access, PrepareSettings()).sample.metadata == {
        "id": "a",
        "text": "it is five",
        "source": "a.flac",
        "lang": "de",
    }
    write_lines(Path(path), [{**line("a"), "text": None, "normalized": "it is five"}])
    assert "text" not in Corpus(f"jsonl:{path},text=normalized")["a"].fields
    assert Corpus(f"{two[1]},set.text=five")["a"].fields == {"lang": "de", "text": "five"}


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match="no source is given"):
        Corpus()

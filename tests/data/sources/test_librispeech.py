from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
from source_files import Corpus, write_lines, write_tone

from speechllm.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    write_lines(
        root / "SPEAKERS.TXT",
        [
            ";ID  |SEX| SUBSET           |MINUTES| NAME",
            "14   | F | train-clean-360  | 25.03 | Kristin LeMoine",
            "1089 | M | test-clean       | 8.03  | Peter | Bobbe",
        ],
    )
    for speaker, chapter in (("1089", "134686"), ("14", "208")):
        folder = root / "test-clean" / speaker / chapter
        names = [f"{speaker}-{chapter}-{i:04d}" for i in range(2)]
        for i, name in enumerate(names):
            write_tone(folder / f"{name}.flac", 0.3, seed=int(speaker) + i)
        lines = [f"{name} HE HOPED {i}" for i, name in enumerate(names)]
        write_lines(folder / f"{speaker}-{chapter}.trans.txt", lines)
    return root


@pytest.mark.parametrize("part", ["", "test-clean", "test-clean/1089"])
def test_a_tree_or_a_part_of_it(tree: Path, part: str) -> None:
    corpus = Corpus(f"librispeech:{tree / part}")
    assert list(corpus.utterances)[:2] == ["1089-134686-0000", "1089-134686-0001"]
    assert len(corpus.utterances) == (2 if part.endswith("1089") else 4)
    one = corpus["1089-134686-0001"]
    assert one.text == "HE HOPED 1"
    assert one.fields == {"speaker": "1089", "chapter": "134686", "gender": "m"}
    wanted = write_tone(tree / "again.flac", 0.3, seed=1090)
    np.testing.assert_array_equal(corpus.samples(one.id), wanted)


def test_without_speakers_there_is_no_gender(tree: Path) -> None:
    (tree / "SPEAKERS.TXT").unlink()
    assert "gender" not in Corpus(f"librispeech:{tree}")["14-208-0000"].fields


def test_audio_without_a_transcript_is_left_to_be_counted(tree: Path) -> None:
    folder = tree / "test-clean/14/208"
    write_tone(folder / "14-208-0002.flac", 0.1)
    write_lines(folder / "14-208.trans.txt", ["14-208-0000 A", "14-208-0009 B", "14-208-0001"])
    assert Corpus(f"librispeech:{folder}").texts == {
        "14-208-0000": "A",
        "14-208-0001": None,
        "14-208-0002": None,
        "14-208-0009": "B",
    }


def test_parts_may_be_links(tree: Path) -> None:
    elsewhere = tree.parent / "disk2"
    (tree / "test-clean/14").rename(elsewhere)
    (tree / "test-clean/14").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tree)
    corpus = Corpus(f"librispeech:{tree}")
    assert len(corpus.utterances) == 4
    assert len(corpus.samples("14-208-0000")) == 4800


def test_what_is_wrong_is_named(tree: Path) -> None:
    write_lines(tree / "test-clean/14/208/14-208.trans.txt", ["14-208-0000 A"] * 2)
    with pytest.raises(DataError, match=r"14-208\.trans\.txt:2: 14-208-0000 has a transcript"):
        Corpus(f"librispeech:{tree}")
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*\.trans\.txt below it"):
        Corpus(f"librispeech:{tree}/empty")
    with pytest.raises(DataError, match="no such directory"):
        Corpus(f"librispeech:{tree}/nowhere")

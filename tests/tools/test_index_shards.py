from __future__ import annotations

from pathlib import Path

import pytest
import webdataset
from index_shards import main
from speech_files import tone, write_shards

from speechllm.data.audio import encode_flac
from speechllm.data.index import index_path, open_corpus
from speechllm.errors import UserError


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    with webdataset.ShardWriter(str(tmp_path / "f-%03d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            sample = {"__key__": f"utt{i}", "flac": encode_flac(tone(0.1, seed=i))}
            writer.write(sample | ({"json": {"lang": "en"}} if i == 3 else {"txt": f"text {i}"}))
    return tmp_path


def test_foreign_shards_get_indexes(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(foreign), "--num-workers", "2"]) == 0
    corpus = open_corpus([str(foreign)])
    assert [corpus.key(i) for i in range(len(corpus))] == ["utt0", "utt1", "utt2", "utt4"]
    shown = capsys.readouterr().out
    assert "skipped, the metadata has no `text`:" in shown
    assert f"utt3.json in {foreign}/f-001.tar" in shown


def test_an_index_that_fits_is_left_alone(foreign: Path) -> None:
    tar = str(foreign / "f-000.tar")
    assert main([tar, "--num-workers", "1"]) == 0
    first = Path(index_path(tar)).stat().st_mtime_ns
    assert main([tar]) == 0
    assert Path(index_path(tar)).stat().st_mtime_ns == first
    assert main([tar, "--overwrite"]) == 0
    assert Path(index_path(tar)).stat().st_mtime_ns != first


def test_a_stale_index_is_made_again(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, seconds=(0.1, 0.2))
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(10240))
    assert main([str(tar)]) == 0
    assert len(open_corpus([str(tar)])) == 3


def test_a_bad_tar_keeps_no_other_from_its_index(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = foreign / "f-001.tar"
    bad.write_bytes(bad.read_bytes()[:2000])
    assert main([str(foreign), "--num-workers", "1"]) == 2
    assert f"error: {bad}: truncated" in capsys.readouterr().err
    assert len(open_corpus([str(foreign / "f-000.tar"), str(foreign / "f-002.tar")])) == 3


def test_nothing_to_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.tar there"):
        main([str(tmp_path)])
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack a compressed one"):
        main([str(tmp_path / "a.tar.gz")])

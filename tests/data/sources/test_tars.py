from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np

import pytest
from source_files import Corpus
from speech_files import make_sample, tone, write_shards

from speechllm.data.audio import encode_flac
from speechllm.data.index import index_path
from speechllm.data.shards import write_shard
from speechllm.errors import AudioError, DataError


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def test_shards_of_our_own_are_read_by_their_indexes(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", 5, num_shards=2, seconds=(0.2, 0.4), speaker="s")
    sample = make_sample("x.y/z", "deep", 0.3, seed=77, start=1.5)
    write_shard(str(tmp_path / "a/more.tar"), [sample])
    corpus = Corpus(f"tar:{tmp_path}/a")
    assert len(corpus.utterances) == 6
    assert corpus["x.y/z"].text == "deep"
    assert corpus["x.y/z"].fields == {"start": 1.5}
    assert not corpus["x.y/z"].is_cut
    assert corpus["x.y/z"].seconds == 0.3
    assert corpus["utt-00003"].fields == {"speaker": "s"}
    np.testing.assert_array_equal(corpus.samples("x.y/z"), tone(0.3, seed=77))
    assert corpus["x.y/z"].audio.path == "more.tar"  # type: ignore[union-attr]


def test_foreign_tars_are_scanned_and_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        members = {
            "000.flac": encode_flac(tone(0.2, seed=ord(part))),
            "000.txt": f" text {part} ".encode(),
            "lost.txt": b"no audio",
        }
        write_tar(tmp_path / part / f"shard-{part}.tar", members)
    spec = f"tar:{tmp_path}/*/shard-*.tar"
    with pytest.raises(DataError, match="id '000' is on line 1 and on line 2"):
        Corpus(spec)
    with caplog.at_level(logging.WARNING, "speechllm"):
        corpus = Corpus(spec + ",ids=shard")
    assert "metadata without audio (1); e.g. lost.txt" in caplog.text
    assert corpus.texts == {"shard-a/000": "text a", "shard-b/000": "text b"}
    np.testing.assert_array_equal(corpus.samples("shard-b/000"), tone(0.2, seed=ord("b")))
    two = [f"tar:{tmp_path}/{part}/shard-{part}.tar,prefix={part}-" for part in "ab"]
    assert list(Corpus(*two).utterances) == ["a-000", "b-000"]


def test_ids_by_field_or_by_key(tmp_path: Path) -> None:
    members = {
        "k%20k.flac": encode_flac(tone(0.2)),
        "k%20k.json": json.dumps({"text": "t", "id": "real", "lang": "cs"}).encode(),
    }
    write_tar(tmp_path / "x.tar", members)
    corpus = Corpus(f"tar:{tmp_path}/x.tar")
    assert corpus["real"].fields == {"lang": "cs"}
    assert list(Corpus(f"tar:{tmp_path}/x.tar,ids=key").utterances) == ["k k"]


def test_a_tar_cut_off_after_the_plan_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, seconds=(0.2, 0.4))
    corpus = Corpus(f"tar:{tmp_path}")
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(AudioError, match=r"undecodable: .*train-000000\.tar at byte .*cut off"):
        corpus.samples("utt-00001")
    with pytest.raises(DataError, match="the tar is truncated"):
        Corpus(f"tar:{tmp_path}")
    Path(index_path(str(tar))).unlink()
    with pytest.raises(DataError, match="truncated"):
        Corpus(f"tar:{tmp_path}")
    with pytest.raises(DataError, match=r"no \*\.tar there"):
        Corpus(f"tar:{tmp_path}/nowhere")

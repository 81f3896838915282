from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from speech_files import make_sample, write_shards

from speechllm.data.audio import decode_audio
from speechllm.data.index import index_path, open_corpus
from speechllm.data.shards import (
    Sample,
    encode_metadata,
    parse_size,
    safe_key,
    tar_header,
    write_shard,
)
from speechllm.data.store import Store
from speechllm.errors import DataError


@given(one=st.text(min_size=1).filter(lambda s: s.isprintable()))
def test_keys_are_plain_and_give_the_id_back(one: str) -> None:
    key = safe_key(one)
    assert key.isascii()
    assert not set(key) & set("./ \\\0\n\t")
    assert unquote(key) == one


def test_usual_ids_stay_as_they_are() -> None:
    assert safe_key("1272-128104-0000_x~") == "1272-128104-0000_x~"
    assert safe_key("a/b c.1") == "a%2Fb%20c%2E1"


def test_shards_are_deterministic_and_tell_nothing_of_their_maker(tmp_path: Path) -> None:
    samples = [make_sample(f"id {i}.x", "text", 0.1, seed=i) for i in range(3)]
    for name in ("a", "b"):
        write_shard(str(tmp_path / f"{name}.tar"), samples)
    for suffix in (".tar", ".index.arrow"):
        a, b = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert a == b
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:2]] == ["id%200%2Ex.flac", "id%200%2Ex.json"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
        assert (member.uname, member.gname) == ("", "")


def test_webdataset_reads_our_shards_with_its_ordinary_pipeline(tmp_path: Path) -> None:
    write_shards(tmp_path, 6, num_shards=2, seconds=(0.1, 0.3), name="my.set", speaker="žofie")
    corpus = open_corpus([str(tmp_path)])
    store = Store(corpus)
    expected = [store.read(i) for i in range(6)]
    pipeline = webdataset.WebDataset(corpus.shards, shardshuffle=False).decode()
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [one.key for one in expected]
    for sample, one in zip(samples, expected, strict=True):
        assert sample["json"]["text"] == one.text
        assert sample["json"]["speaker"] == "žofie"
    raw = list(webdataset.WebDataset(corpus.shards, shardshuffle=False))
    for sample, one in zip(raw, expected, strict=True):
        assert (decode_audio(sample["flac"], "flac") == one.samples).all()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_the_tar_program_reads_our_shards(tmp_path: Path) -> None:
    key = "k" * 180
    write_shard(str(tmp_path / "a.tar"), [make_sample(key, "ž", 0.1)])
    subprocess.run(["tar", "-xf", "a.tar"], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / f"{key}.json").read_bytes()) == {"id": key, "text": "ž"}


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield make_sample("a", "x", 0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(str(tmp_path / "a.tar"), samples())
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_and_their_hash_are_told(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    written = write_shard(str(tar), [make_sample("a", "x", 0.1), make_sample("b", "y", 0.2)])
    content = tar.read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())


def test_python_s_tarfile_would_write_the_same(tmp_path: Path) -> None:
    samples = [make_sample(f"{'k' * 120 * i}x", "text", 0.1, seed=i) for i in range(3)]
    write_shard(str(tmp_path / "a.tar"), samples)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for sample in samples:
            metadata = encode_metadata(sample.metadata)
            for name, data in (
                (f"{sample.key}.flac", sample.audio),
                (f"{sample.key}.json", metadata),
            ):
                header = tarfile.TarInfo(name)
                header.size, header.mode = len(data), 0o644
                archive.addfile(header, io.BytesIO(data))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@given(name=st.text("ab.%-_/ž", min_size=1, max_size=130), size=st.integers(0, 2**40))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    assert tar_header(name, size) == header.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("place", ["nowhere/a.tar", "file/a.tar"])
def test_a_place_that_cannot_be_written_is_a_users_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"a\.tar: cannot be written \(.*finished shards are kept"):
        write_shard(str(tmp_path / place), [make_sample("a", "x", 0.1)])


def test_the_index_has_its_name_before_the_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(str(b)), rename(a, b)))
    tar = str(tmp_path / "a.tar")
    write_shard(tar, [make_sample("a", "x", 0.1)])
    assert order == [index_path(tar), tar]


def test_a_file_that_another_run_has_cleared_away_is_a_users_error(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield make_sample("a", "x", 0.1)
        for aside in tmp_path.glob("*.tmp-*"):
            aside.unlink()

    with pytest.raises(DataError, match=r"a\.tar: cannot be written \(No such file"):
        write_shard(str(tmp_path / "a.tar"), samples())
    assert not (tmp_path / "a.tar").exists()


def test_keys_must_differ(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a is there already"):
        write_shard(str(tmp_path / "a.tar"), [make_sample("a", "x", 0.1)] * 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MB", 256_000_000),
        ("1GiB", 2**30),
        ("1.5 kb", 1500),
        ("64m", 64_000_000),
        ("100", 100),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1MB", "0", "1TB2", "MB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="256MB"):
        parse_size(text)

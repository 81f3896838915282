from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import fsspec
import pytest
import soundfile
import webdataset
from http_files import serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speech_files import make_sample, tone, write_shards

from speechllm.data.audio import encode_flac
from speechllm.data.index import index_path, open_corpus
from speechllm.data.scan import build_index
from speechllm.data.shards import write_shard
from speechllm.data.store import Store
from speechllm.errors import DataError


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return str(path)


def texts(tar: str) -> dict[str, str]:
    corpus = open_corpus([tar])
    store = Store(corpus)
    return {store.read(i).key: store.read(i).text for i in range(len(corpus))}


FLAC = encode_flac(tone(0.2))


def test_our_own_shards_get_the_index_they_have(tmp_path: Path) -> None:
    write_shards(tmp_path, 5, seconds=(0.1, 0.3))
    tar = str(tmp_path / "train-000000.tar")
    written = Path(index_path(tar)).read_bytes()
    report = build_index(tar)
    assert Path(index_path(tar)).read_bytes() == written
    assert (report.utterances, report.skipped) == (5, {})
    assert report.seconds == pytest.approx(open_corpus([tar]).durations.sum())


def test_tars_of_the_webdataset_writer(tmp_path: Path) -> None:
    tar = str(tmp_path / "a.tar")
    with webdataset.TarWriter(tar) as writer:
        writer.write({"__key__": "one", "flac": FLAC, "json": {"text": "eins"}})
        writer.write({"__key__": "d/two", "txt": "zwei", "flac": FLAC})
        writer.write({"__key__": "three", "flac": FLAC, "txt": "drei", "cls": 7})
    report = build_index(tar)
    assert texts(tar) == {"one": "eins", "d/two": "zwei", "three": "drei"}
    assert report.skipped == {}


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_tars_of_the_tar_program(tmp_path: Path) -> None:
    source = tmp_path / "source" / "deep"
    source.mkdir(parents=True)
    long = "x" * 150
    for key in ("a", "b.1", "b.2", long):
        (source / f"{key}.flac").write_bytes(FLAC)
        (source / f"{key}.txt").write_text(f"text of {key[:3]}\n")
    tar = str(tmp_path / "a.tar")
    subprocess.run(["tar", "-cf", tar, "-C", str(tmp_path / "source"), "."], check=True)
    report = build_index(tar)
    assert report.skipped == {}
    assert texts(tar) == {
        "deep/a": "text of a",
        "deep/b.1": "text of b.1",
        "deep/b.2": "text of b.2",
        f"deep/{long}": "text of xxx",
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_names(tmp_path: Path, form: int) -> None:
    long = "y" * 90
    key = f"žluť/{long}" if form != tarfile.USTAR_FORMAT else long
    if form != tarfile.USTAR_FORMAT:
        key += long
    tar = write_tar(tmp_path / "a.tar", {f"{key}.flac": FLAC, f"{key}.TXT": b"x"}, form)
    build_index(tar)
    assert texts(tar) == {key: "x"}


def test_any_order_within_a_tar(tmp_path: Path) -> None:
    members = {"a.txt": b"A", "b.flac": FLAC, "c.json": b'{"text": "C"}', "a.flac": FLAC}
    members |= {"b.text": b"B", "c.flac": FLAC}
    tar = write_tar(tmp_path / "a.tar", members)
    build_index(tar)
    assert texts(tar) == {"a": "A", "b": "B", "c": "C"}


def test_what_is_no_utterance_is_skipped_and_named(tmp_path: Path) -> None:
    wav = io.BytesIO()
    soundfile.write(wav, tone(0.1)[:0], 16000, format="WAV")
    members = {
        "good.flac": FLAC,
        "good.json": b'{"text": "ok"}',
        "good.npy": b"besides",
        "notext.flac": FLAC,
        "notext.json": b'{"lang": "en"}',
        "broken.flac": b"nothing",
        "broken.txt": b"x",
        "empty.wav": wav.getvalue(),
        "empty.txt": b"x",
        "film.m4a": bytes(100),
        "film.txt": b"x",
        "alone.flac": FLAC,
        "silent.txt": b"x",
        "._good.flac": b"resource fork",
        "README.md": b"x",
        "latin.flac": FLAC,
        "latin.txt": "ž".encode("latin2"),
    }
    path = tmp_path / "a.tar"
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "good.flac"
        archive.addfile(link)
        directory = tarfile.TarInfo("d")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
    report = build_index(str(path))
    assert report.utterances == 1
    assert texts(str(path)) == {"good": "ok"}
    skipped = {reason.split(":")[0]: names for reason, names in report.skipped.items()}
    assert skipped == {
        "the metadata has no `text`": ["notext.json"],
        "audio undecodable": ["broken.flac"],
        "audio empty": ["empty.wav"],
        "audio unsupported": ["film.m4a"],
        "audio without metadata": ["alone.flac"],
        "metadata without audio": ["silent.txt"],
        "hidden file": ["._good.flac"],
        "neither audio nor text": ["README.md"],
        "the metadata is not UTF-8": ["latin.txt"],
        "link, sparse or special file": ["link.flac"],
    }


def test_json_without_text_beside_a_text_file_is_no_loss(tmp_path: Path) -> None:
    members = {"a.flac": FLAC, "a.json": b'{"lang": "en"}', "a.txt": b"A"}
    tar = write_tar(tmp_path / "a.tar", members)
    assert build_index(tar).skipped == {}
    assert texts(tar) == {"a": "A"}


def test_empty_text_stays_for_the_plan_to_drop(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.flac": FLAC, "a.json": b'{"text": "  "}'})
    build_index(tar)
    assert open_corpus([tar]).text_lengths.tolist() == [0]


def test_text_length_counts_characters(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.flac": FLAC, "a.txt": " žluť\n".encode()})
    build_index(tar)
    assert open_corpus([tar]).text_lengths.tolist() == [4]


def test_mp3_has_a_duration(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(1.5), 16000, format="MP3")
    tar = write_tar(tmp_path / "a.tar", {"a.mp3": buffer.getvalue(), "a.txt": b"x"})
    build_index(tar)
    assert open_corpus([tar]).durations.tolist() == [1.5]


def test_an_empty_tar_gets_an_empty_index(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {})
    assert build_index(tar).utterances == 0
    assert len(open_corpus([tar])) == 0


def shard_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.tar"
    write_shard(str(path), [make_sample(key, "some text", 0.2) for key in "abc"])
    return path.read_bytes()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = shard_bytes(tmp_path)
    end = len(data.rstrip(b"\0"))
    tar = tmp_path / "cut.tar"
    cuts = [512, 700, 5000, end // 2, end - 600, end - 1, (end + 511) // 512 * 512]
    for cut in cuts:
        tar.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"cut.tar: truncated"):
            build_index(str(tar))
        assert not os.path.exists(index_path(str(tar)))


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    data = bytearray(shard_bytes(tmp_path))
    second = open_corpus([str(tmp_path / "whole.tar")]).location(1).audio_offset - 512
    data[second + 20] ^= 0xFF
    tar = tmp_path / "bad.tar"
    tar.write_bytes(data)
    with pytest.raises(DataError, match=f"bad.tar: damaged header at byte {second}"):
        build_index(str(tar))


def test_tars_joined_by_cat_are_refused(tmp_path: Path) -> None:
    tar = tmp_path / "two.tar"
    tar.write_bytes(shard_bytes(tmp_path) * 2)
    with pytest.raises(DataError, match=r"more data after .* `tar --concatenate`"):
        build_index(str(tar))


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar" * 1000, gzip.compress(bytes(2000), mtime=0)],
    ids=["empty", "text", "gzip"],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"a.tar: (empty file|truncated or not a tar|compressed)"):
        build_index(str(tar))


def test_compressed_and_missing_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unpack a compressed one"):
        build_index(str(tmp_path / "a.tar.gz"))
    with pytest.raises(DataError, match=r"a.tar: cannot be read"):
        build_index(str(tmp_path / "a.tar"))


def test_a_remote_tar_gets_its_index_beside_it(tmp_path: Path) -> None:
    with fsspec.open("memory://scan/a.tar", "wb") as file:
        file.write(shard_bytes(tmp_path))
    build_index("memory://scan/a.tar")
    assert texts("memory://scan/a.tar") == dict.fromkeys("abc", "some text")


def test_an_http_server_is_given_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, 1)
    (tmp_path / "train-000000.index.arrow").unlink()
    with serve(tmp_path) as files:
        tar = f"{files.url}/train-000000.tar"
        with pytest.raises(DataError, match=r"has no index .* put the index beside the tar"):
            open_corpus([tar])
        files.requests.clear()
        with pytest.raises(DataError, match=r"index\.arrow: cannot be written over http; index a"):
            build_index(tar)
        assert not files.requests


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_gets_past_as_anything_but_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp()
    content = bytearray(shard_bytes(directory))
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 600))
        content[at] = data.draw(st.integers(0, 255))
    tar = directory / "damaged.tar"
    tar.write_bytes(content)
    with contextlib.suppress(DataError):
        assert build_index(str(tar)).utterances <= 3

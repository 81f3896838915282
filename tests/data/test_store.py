from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import fsspec
import pytest
from http_files import Server, serve
from speech_files import make_sample, tone, write_shards
from worker_copy import worker_copy

from speechllm.data import remote
from speechllm.data import store as store_module
from speechllm.data.audio import encode_flac
from speechllm.data.cache import BlockCache
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.shards import Sample, write_shard
from speechllm.data.store import Store
from speechllm.errors import AudioError, DataError


def shard(path: Path, samples: list[Sample]) -> Corpus:
    write_shard(str(path), samples)
    return open_corpus([str(path)])


def damage(corpus: Corpus, i: int, old: bytes, new: bytes) -> None:
    """Change a member's data, which the index cannot see."""
    assert len(old) == len(new)
    place = corpus.location(i)
    data = Path(place.shard).read_bytes()
    first = min(place.audio_offset, place.meta_offset)
    assert old in data[first:]
    at = data.index(old, first)
    Path(place.shard).write_bytes(data[:at] + new + data[at + len(old) :])


def test_utterances_come_back(tmp_path: Path) -> None:
    samples = [
        make_sample("a", "first text", 0.3, seed=1),
        make_sample("b.1/x y", " žluťoučký kůň ", 0.5, seed=2, speaker="s1", lang="cs"),
    ]
    store = Store(shard(tmp_path / "a.tar", samples))
    utterance = store.read(1)
    assert utterance.text == "žluťoučký kůň"
    assert utterance.fields == {"id": "b.1/x y", "speaker": "s1", "lang": "cs"}
    assert utterance.key == "b%2E1%2Fx%20y"
    np.testing.assert_array_equal(utterance.samples, tone(0.5, seed=2))
    assert store.read(0).text == "first text"


def test_far_apart_members_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = shard(tmp_path / "a.tar", [make_sample("a", "x", 0.2)])
    near = Store(corpus).read_raw(corpus.location(0))
    monkeypatch.setattr(store_module, "_GAP", 0)
    assert Store(corpus).read_raw(corpus.location(0)) == near


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_FILES", 2)
    corpus = open_corpus([str(write_shards(tmp_path, 5, num_shards=5, seconds=(0.1, 0.2)))])
    before = len(os.listdir("/proc/self/fd"))
    store = Store(corpus)
    for i in [*range(5), *range(5)]:
        assert store.read(i).key == f"utt-{i:05d}"
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_undecodable_audio_names_key_and_shard(tmp_path: Path) -> None:
    corpus = shard(tmp_path / "a.tar", [make_sample("a", "x", 0.2), make_sample("b", "x", 0.2)])
    damage(corpus, 1, b"fLaC", b"----")
    store = Store(corpus)
    with pytest.raises(AudioError, match=r"^b in .*a\.tar: undecodable"):
        store.read(1)
    assert store.read(0).key == "a"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [(b'"text"', b'"tixt"', "no `text`"), (b'{"id"', b'["id"', "not JSON")],
)
def test_bad_metadata_name_key_and_shard(
    tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    corpus = shard(tmp_path / "a.tar", [make_sample("a", "x", 0.2)])
    damage(corpus, 0, old, new)
    with pytest.raises(DataError, match=rf"^a in .*a\.tar: .*{message}"):
        Store(corpus).read(0)


def test_a_shard_that_shrinks_or_goes_away_is_named(tmp_path: Path) -> None:
    corpus = shard(tmp_path / "a.tar", [make_sample("a", "x", 0.2)])
    store = Store(corpus)
    store.read(0)
    os.truncate(tmp_path / "a.tar", 1000)
    with pytest.raises(DataError, match=r"^a in .*a\.tar: 488 of .* truncated while in use"):
        store.read(0)
    os.remove(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"^a in .*a\.tar: cannot be read"):
        Store(corpus).read(0)


def test_a_server_that_fails_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, 1, seconds=(0.1, 0.2))
    for path in tmp_path.iterdir():
        with fsspec.open(f"memory://failing/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    store = Store(open_corpus(["memory://failing"]))
    assert store.read(0).key == "utt-00000"
    monkeypatch.setattr(remote, "PAUSE", 0.001)

    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be read .*503 Service"):
        store.read(0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_shards(tmp_path / "web", 12, num_shards=3, seconds=(0.1, 0.4))
    with serve(tmp_path / "web") as files:
        yield files


@pytest.mark.parametrize("cached", [False, True])
def test_shards_on_an_http_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    local = Store(open_corpus([str(server.directory)]))
    cache = BlockCache(str(tmp_path / "cache"), 1 << 30) if cached else None
    server.latency = 0.002
    server.fault = lambda path, times: ("status 503", "short", "", "")[times % 4]
    corpus = open_corpus([f"{server.url}/train-{{000000..000002}}.tar"], cache)
    assert corpus.fingerprint == local.corpus.fingerprint
    for _ in range(2):
        store = worker_copy(Store(corpus))
        for i in range(12):
            one, other = store.read(i), local.read(i)
            assert (one.key, one.text, one.fields) == (other.key, other.text, other.fields)
            np.testing.assert_array_equal(one.samples, other.samples)
    tars = [wanted for path, wanted in server.requests if path.endswith(".tar")]
    ranges = {wanted for wanted in tars if wanted != "bytes=0-0"}
    assert len(ranges) <= 12
    if cached:  # one block a shard, fetched once, whatever fails
        assert ranges == {f"bytes=0-{tar.stat().st_size - 1}" for tar in server.tars()}


def test_a_shard_that_changes_on_its_server_is_named(server: Server) -> None:
    (tar, *_) = server.tars()
    store = Store(open_corpus([f"{server.url}/{tar.name}"]))
    store.read(0)
    damaged = tar.read_bytes()
    tar.write_bytes(damaged[:-1] + b"x")
    with pytest.raises(DataError, match=r"^utt-00001 in .*: cannot be read .*changed while in use"):
        store.read(1)


def test_remote_blocks_are_those_that_reading_needs(server: Server, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 1 << 30)
    store = Store(open_corpus([f"{server.url}/train-{{000000..000002}}.tar"], cache))
    blocks = [block for i in range(12) for block in store.remote_blocks(i)]
    assert set(blocks) == {(f"{server.url}/{tar.name}", 0) for tar in server.tars()}
    for block in set(blocks):
        store.keep_block(*block)
    server.requests.clear()
    for i in range(12):
        store.read(i)
    assert not server.requests
    assert list(Store(open_corpus([str(server.directory)], cache)).remote_blocks(0)) == []


def _keys(store: Store, queue: multiprocessing.SimpleQueue[str]) -> None:
    queue.put(json.dumps([store.read(i).key for i in range(4)]))


@pytest.mark.parametrize("remote", [False, True])
def test_a_store_survives_fork_and_pickle(tmp_path: Path, remote: bool) -> None:
    directory = str(write_shards(tmp_path, 4, num_shards=2, seconds=(0.1, 0.2)))
    if remote:
        for path in tmp_path.iterdir():
            with fsspec.open(f"memory://store/{path.name}", "wb") as file:
                file.write(path.read_bytes())
        directory = "memory://store"
    store = Store(open_corpus([directory]))
    expected = [store.read(i).key for i in range(4)]
    assert [worker_copy(store).read(i).key for i in range(4)] == expected
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_keys, args=(store, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [json.loads(queue.get()) for _ in children] == [expected, expected]
    for child in children:
        child.join()
    assert [store.read(i).key for i in range(4)] == expected


def test_flac_bytes_in_the_shard_are_those_given(tmp_path: Path) -> None:
    corpus = shard(tmp_path / "a.tar", [make_sample("a", "x", 0.2, seed=3)])
    audio, _ = Store(corpus).read_raw(corpus.location(0))
    assert audio == encode_flac(tone(0.2, seed=3))

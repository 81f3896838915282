"""Encoder outputs on disk: what is written comes back, and nothing else is taken for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

import pytest
from http_files import serve
from speech_files import write_shards
from worker_copy import worker_copy

from speechllm.data.cache import BlockCache
from speechllm.data.collate import collate
from speechllm.data.features import (
    Dtype,
    FeatureStore,
    FeatureWriter,
    feature_path,
    frame_bytes,
    open_features,
)
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.store import Store
from speechllm.errors import DataError
from speechllm.types import AudioSegment, EncodedAudio, Example, TextSegment

WIDTH = 6
DTYPES: tuple[Dtype, ...] = ("bf16", "int8")


def encoded(num_samples: int, dtype: Dtype, seed: int) -> EncodedAudio:
    rng = np.random.default_rng([5, seed])
    shape = (-(-num_samples // 320), WIDTH)
    if dtype == "bf16":
        return EncodedAudio(num_samples, rng.integers(0, 1 << 14, shape).astype(np.int16))
    scales_D = rng.uniform(0.1, 1, WIDTH).astype(np.float32)
    return EncodedAudio(num_samples, rng.integers(-127, 128, shape).astype(np.int8), scales_D)


def write_features(corpus: Corpus, dtype: Dtype, *, without: tuple[int, ...] = ()) -> None:
    """Of every shard, the last utterance first; utterance i has encoded(..., i)."""
    store, first = Store(corpus), 0
    for tar, count in zip(corpus.shards, corpus.shard_sizes.tolist(), strict=True):
        with FeatureWriter(feature_path(tar, "key", dtype), count) as writer:
            for row in reversed(range(count)):
                if first + row in without:
                    writer.leave_out(row, "undecodable: noise")
                    continue
                samples = len(store.read(first + row).samples)
                writer.add(row, encoded(samples, dtype, first + row))
            writer.finish({"dtype": dtype, "width": WIDTH, "frame_samples": 320})
        first += count


def assert_same(one: EncodedAudio | None, other: EncodedAudio) -> None:
    assert one is not None
    assert one.num_samples == other.num_samples
    assert one.values_TD.dtype == other.values_TD.dtype
    np.testing.assert_array_equal(one.values_TD, other.values_TD)
    np.testing.assert_array_equal(one.scales_D, other.scales_D)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Five utterances in three shards, the last of which is empty."""
    directory = write_shards(tmp_path / "s", 5, num_shards=2, seconds=(0.1, 0.3), speaker="anna")
    write_shards(directory, 0, name="x")
    return open_corpus([str(directory)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_come_back_with_the_shards_metadata(corpus: Corpus, dtype: Dtype) -> None:
    write_features(corpus, dtype)
    usual, store = Store(corpus), FeatureStore(corpus, "key", dtype)
    for copy in (store, worker_copy(store)):
        for i in (4, 0, 2, 1, 3):
            wanted, found = usual.read(i), copy.read(i)
            assert (found.key, found.text, found.fields) == (wanted.key, wanted.text, wanted.fields)
            assert (found.duration, len(found.samples)) == (wanted.duration, 0)
            assert_same(found.encoded, encoded(len(wanted.samples), dtype, i))
    files = [open_features(feature_path(tar, "key", dtype)) for tar in corpus.shards]
    assert [file.rows.num_rows for file in files] == [3, 2, 0]
    assert all(row % 64 == 0 for row in files[0].rows.column("offset").to_pylist())


def test_no_audio_is_decoded(corpus: Corpus) -> None:
    write_features(corpus, "int8")
    place = corpus.location(3)
    data = bytearray(Path(place.shard).read_bytes())
    data[place.audio_offset : place.audio_offset + place.audio_size] = bytes(place.audio_size)
    Path(place.shard).write_bytes(data)
    with pytest.raises(DataError, match="undecodable"):
        Store(corpus).read(3)
    assert FeatureStore(corpus, "key", "int8").read(3).encoded is not None


def test_what_had_no_frames_says_why(corpus: Corpus) -> None:
    write_features(corpus, "bf16", without=(1,))
    store = FeatureStore(corpus, "key", "bf16")
    with pytest.raises(DataError, match=r"^utt-00001 in .*\.tar: undecodable: noise$"):
        store.read(1)
    assert store.read(2).key == "utt-00002"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_foreseen(corpus: Corpus, dtype: Dtype) -> None:
    write_features(corpus, dtype)
    file = open_features(feature_path(corpus.shards[0], "key", dtype))
    for row in range(3):
        _, size, samples = file.place(row)
        assert size == frame_bytes(dtype, WIDTH, -(-samples // 320))
    assert frame_bytes(dtype, 10, 7, 2) == (140 if dtype == "bf16" else 150)


def test_damaged_files_are_refused(corpus: Corpus) -> None:
    write_features(corpus, "bf16")
    path = Path(feature_path(corpus.shards[0], "key", "bf16"))
    whole = path.read_bytes()
    for damaged in (b"", b"short", whole[:-1], whole[:-40] + whole[-16:], bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"features-key-bf16\.bin: "):
            open_features(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_features(str(path))
    with pytest.raises(DataError, match="removed while in use"):
        FeatureStore(corpus, "key", "bf16").read(0)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = str(tmp_path / "x.bin")
    with FeatureWriter(path, 1) as writer:
        writer.add(0, encoded(320, "bf16", 0))
        assert len(os.listdir(tmp_path)) == 1
        assert not os.path.exists(path)
    assert os.listdir(tmp_path) == []  # it was left before it was finished
    with pytest.raises(DataError, match="cannot be written"):
        FeatureWriter(str(tmp_path / "no" / "x.bin"), 1)


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    path, other = str(tmp_path / "[a]-bf16.bin"), tmp_path / "b-bf16.bin.tmp-1"
    for leftover in (Path(f"{path}.tmp-1"), Path(f"{path}.tmp-23"), other):
        leftover.write_bytes(b"x")
    with FeatureWriter(path, 0) as writer:
        writer.finish({})
    assert sorted(tmp_path.iterdir()) == sorted([Path(path), other])


@pytest.mark.parametrize("cached", [False, True])
def test_remote_files_are_read_by_ranges(corpus: Corpus, tmp_path: Path, cached: bool) -> None:
    write_features(corpus, "int8")
    directory = Path(corpus.shards[0]).parent
    with serve(directory) as server:
        cache = BlockCache(str(tmp_path / "cache"), 1 << 30) if cached else None
        remote = open_corpus([f"{server.url}/train-{{000000..000001}}.tar"], cache)
        store = FeatureStore(remote, "key", "int8")
        blocks = {block for i in range(5) for block in store.remote_blocks(i)}
        assert {url.rpartition(".")[2] for url, _ in blocks} == (
            {"tar", "bin"} if cached else set()
        )
        for block in blocks:
            store.keep_block(*block)
        server.requests.clear()
        for i in range(5):
            assert_same(
                store.read(i).encoded, encoded(len(Store(corpus).read(i).samples), "int8", i)
            )
        assert not cached or not server.requests


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_frames_is_that_of_the_audio_otherwise(dtype: Dtype) -> None:
    lengths = (700, 321, 1)
    parts = [encoded(n, dtype, n) for n in lengths]
    examples = {
        with_frames: [
            Example(
                f"u{n}",
                (
                    TextSegment((1, 2)),
                    AudioSegment(np.zeros(0, np.int16), encoded=part)
                    if with_frames
                    else AudioSegment(np.full(n, 7, np.int16)),
                    TextSegment((3,), trained=True),
                ),
            )
            for n, part in zip(lengths, parts, strict=True)
        ]
        for with_frames in (False, True)
    }
    usual, batch = (collate(examples[way], lambda n: n // 100, pad_id=0) for way in (False, True))
    assert usual.frames is None
    assert batch.frames is not None
    assert batch.audio_AN.shape == (3, 0)
    for name in ("audio_lengths_A", "tokens_BS", "audio_mask_BS", "attention_mask_BS", "labels_BS"):
        assert torch.equal(getattr(batch, name), getattr(usual, name)), name
    values_ATD = batch.frames.values_ATD
    assert values_ATD.dtype == (torch.bfloat16 if dtype == "bf16" else torch.int8)
    decoded_ATD = batch.to(torch.device("cpu")).frames.decoded(torch.float32)  # type: ignore[union-attr]
    assert decoded_ATD.shape == (3, 3, WIDTH)
    for a, part in enumerate(parts):
        count = len(part.values_TD)
        values_TD = torch.from_numpy(part.values_TD)
        if part.scales_D is None:
            expected_TD = values_TD.view(torch.bfloat16).float()
        else:
            expected_TD = values_TD * torch.from_numpy(part.scales_D)
        torch.testing.assert_close(decoded_ATD[a, :count], expected_TD)
        assert not decoded_ATD[a, count:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silence_has_frames_too(corpus: Corpus, dtype: Dtype) -> None:
    write_features(corpus, dtype)
    silence = FeatureStore(corpus, "key", dtype).silence
    assert silence.duration == Store(corpus).silence.duration
    assert silence.encoded is not None
    assert silence.encoded.values_TD.shape == (5, WIDTH)

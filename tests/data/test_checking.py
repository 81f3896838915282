from __future__ import annotations

from pathlib import Path

import numpy as np

from hypothesis import given
from hypothesis import strategies as st
from speech_files import make_sample, write_shards

from speechllm.data.checking import (
    CheckTask,
    check_shard,
    common_lengths,
    equal_pairs,
    repeated,
    sha256_of,
)
from speechllm.data.shards import write_shard

hashes = st.lists(st.integers(0, 6), max_size=20).map(lambda drawn: np.array(drawn, np.uint64))


@given(hashes, hashes)
def test_pairs_of_equals(first: np.ndarray, second: np.ndarray) -> None:
    listed = first.tolist()
    expected = [
        [listed.index(value), i]
        for i, value in enumerate(second.tolist())
        if value != 0 and value in listed
    ]
    assert equal_pairs(first, second).tolist() == expected


@given(hashes)
def test_later_places_of_what_repeats(values: np.ndarray) -> None:
    listed = values.tolist()
    expected = [[listed.index(one), i] for i, one in enumerate(listed) if listed.index(one) < i]
    assert repeated(values).tolist() == expected


def test_a_shard_is_hashed_as_far_as_asked_for(tmp_path: Path) -> None:
    tar = str(tmp_path / "a.tar")
    written = write_shard(
        tar,
        [
            make_sample("a", "One, two  THREE.", 0.2, seed=1),
            make_sample("b", "one two three", 0.2, seed=1),
            make_sample("c", "one two", 0.3, seed=1),
        ],
    )
    assert sha256_of(tar) == written.sha256
    plain = check_shard(CheckTask(tar, written.sha256, decode=0))
    assert (plain.utterances, plain.decoded, plain.findings) == (3, 0, [])
    assert len(set(plain.ids.tolist())) == 3
    assert not plain.texts.any()
    assert not plain.audio.any()
    texts = check_shard(CheckTask(tar, decode=0, min_words=3)).texts
    assert texts[0] == texts[1] != 0
    assert texts[2] == 0
    some = check_shard(CheckTask(tar, decode=0, same_length=np.array([0.2])))
    assert some.audio[0] == some.audio[1] != 0
    assert (some.audio[2], some.decoded) == (0, 2)
    every = check_shard(CheckTask(tar))
    assert len(set(every.audio.tolist())) == 2
    assert every.decoded == 3


def test_a_sample_is_spread_over_the_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, 9, seconds=(0.1, 0.2))
    found = check_shard(CheckTask(str(tmp_path / "train-000000.tar"), decode=3))
    assert np.flatnonzero(found.audio).tolist() == [0, 4, 8]


def test_lengths_in_common() -> None:
    splits = [np.array([0.2, 0.1, 0.2]), np.array([0.3, 0.2]), np.array([0.4, 0.3])]
    assert common_lengths(splits).tolist() == [0.2, 0.3]
    assert common_lengths(splits[:1]).tolist() == []

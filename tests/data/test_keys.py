from __future__ import annotations

import numpy as np

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.data.keys import hash_keys, uniforms

HASHES = [16294208416658607535, 14637922807174951167, 4287864908679516151]
DRAWS = [0.35154517726661283, 0.1979275217783013, 0.5993524597717398]

keys = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=12)


@given(keys, st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_a_keys_hash_depends_on_nothing_but_the_key(texts: list[str], a: int, b: int) -> None:
    hashes = hash_keys(texts)
    assert hashes.dtype == np.uint64
    assert [hash_keys([text])[0] for text in texts] == hashes.tolist()
    assert hash_keys(pa.array(texts, pa.string())[a:b]).tolist() == hashes[a:b].tolist()
    chunks = pa.chunked_array([texts[:a], [], texts[a:]], pa.string())
    assert hash_keys(chunks).tolist() == hashes.tolist()
    assert len(set(hashes.tolist())) == len(set(texts))


def test_keys_that_differ_by_little_have_hashes_that_differ_by_half_their_bits() -> None:
    texts = [f"speaker-{i // 100:03d}/utt-{i:06d}" for i in range(20_000)]
    hashes = hash_keys(texts)
    assert len(set(hashes.tolist())) == len(texts)
    flipped = np.unpackbits((hashes[1:] ^ hashes[:-1]).view(np.uint8)).mean()
    assert 0.49 < flipped < 0.51


def test_hashes_and_draws_are_the_same_for_ever() -> None:
    """A change here would change the augmentation of runs that go on."""
    hashes = hash_keys(["", "utt-00001", "a much longer key with ünicode"])
    assert hashes.tolist() == HASHES
    assert uniforms(1, 2, hashes, ["speed"])[:, 0].tolist() == DRAWS


def test_draws_are_uniform_and_independent() -> None:
    hashes = hash_keys([f"utt-{i}" for i in range(20_000)])
    drawn = np.concatenate(
        [uniforms(seed, epoch, hashes, ["a", "b"]) for seed, epoch in ((1, 0), (1, 1), (2, 0))],
        axis=1,
    )
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in drawn.T])
    chi_square = ((counts - 1000) ** 2 / 1000).sum(axis=1)
    assert (chi_square < 50).all()  # 19 degrees of freedom: 1 in 10,000
    correlations = np.corrcoef(drawn.T) - np.eye(6)
    assert np.abs(correlations).max() < 0.03

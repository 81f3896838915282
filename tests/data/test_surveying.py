from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speech_files import write_corpus

from speechllm.data.cleaning import CleanSettings
from speechllm.data.manifest import Manifest
from speechllm.data.prepare import PrepareSettings
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.surveying import PackSettings, cut, plan_shards, shuffled, survey_manifest
from speechllm.errors import DataError

SMALL = PackSettings(shard_bytes=60_000)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def read(path: Path) -> Manifest:
    return read_sources([f"jsonl:{path}"], SourceOptions())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read(write_corpus(tmp_path_factory.mktemp("corpus"), 24, seconds=(0.1, 0.6)))


@given(ids=st.sets(st.text("abc0", min_size=1), min_size=1), seed=st.integers(0, 2**64 - 1))
def test_the_order_is_a_permutation_that_ids_and_seed_decide(ids: set[str], seed: int) -> None:
    listed = sorted(ids)
    order = shuffled(listed, seed)
    assert sorted(order.tolist()) == list(range(len(listed)))
    backwards = listed[::-1]
    again = shuffled(backwards, seed)
    assert [listed[i] for i in order] == [backwards[i] for i in again]


def test_another_seed_is_another_order() -> None:
    ids = [str(i) for i in range(50)]
    assert shuffled(ids, 0).tolist() != shuffled(ids, 1).tolist()
    assert shuffled(ids, 0).tolist() != list(range(50))


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=200), shard_bytes=st.integers(1, 5000)
)
def test_cuts_cover_everything_in_like_shards(sizes: list[int], shard_bytes: int) -> None:
    cuts = cut(np.array(sizes), shard_bytes)
    assert cuts[0] == 0
    assert cuts[-1] == len(sizes)
    assert all(a < b for a, b in pairwise(cuts))
    parts = [sum(sizes[a:b]) for a, b in pairwise(cuts)]
    assert all(part < shard_bytes + max(sizes) + 1 for part in parts)
    assert len(parts) <= max(1, -(-sum(sizes) // shard_bytes))


def test_a_survey_sees_what_packing_will_do(manifest: Manifest) -> None:
    found = survey_manifest(manifest, SMALL, 2, quiet)
    alone = survey_manifest(manifest, SMALL, 1, quiet)
    np.testing.assert_array_equal(found.sizes, alone.sizes)
    assert found.sizes.shape == found.seconds.shape == (24,)
    assert found.dropped == []


def test_shards_are_balanced_whatever_is_dropped(manifest: Manifest) -> None:
    clean = CleanSettings(max_seconds=0.4)
    settings = PackSettings(20_000, prepare=PrepareSettings("reencode", clean=clean))
    found = survey_manifest(manifest, settings, 1, quiet)
    assert 4 < len(found.dropped) < 20
    plan = plan_shards(manifest, settings, 1, quiet)
    sizes = found.sizes[shuffled(manifest.ids, 0)]
    parts = [sizes[first:last].sum() for first, last in pairwise(plan.cuts)]
    assert len(parts) > 3
    assert max(parts) - min(parts) <= 2 * sizes.max()


def test_of_equal_audio_the_first_stays_that_is_fit(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, 6, seconds=(0.2, 0.4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["audio"] = lines[4]["audio"] = lines[0]["audio"]
    lines[0]["text"] = "IGNORE"
    lines[5] |= {"audio": lines[1]["audio"], "start": 0.0}  # another reference, the same samples
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    clean = CleanSettings(drop_text=("IGNORE",), drop_duplicate_audio=True)
    settings = PackSettings(prepare=PrepareSettings(clean=clean))
    for workers in (1, 2):
        found = survey_manifest(read(path), settings, workers, quiet)
        assert found.duplicates == {"utt-00004": "utt-00003", "utt-00005": "utt-00001"}
        reasons = [(one.id, one.reason) for one in found.dropped]
        assert reasons == [
            ("utt-00000", "unwanted text"),
            ("utt-00004", "duplicate audio"),
            ("utt-00005", "duplicate audio"),
        ]
        assert (found.sizes > 0).tolist() == [False, True, True, True, False, False]


def test_what_is_not_there_is_in_the_plan(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, 3, seconds=(0.2, 0.4))
    (tmp_path / "audio/train-00001.flac").unlink()
    assert plan_shards(read(path), SMALL, 1, quiet).absent == ["utt-00001"]


def test_a_plan_for_nothing_is_an_error(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, 2, seconds=(0.2, 0.4))
    settings = PackSettings(prepare=PrepareSettings(clean=CleanSettings(min_seconds=9.0)))
    with pytest.raises(DataError, match=r"no utterance is left: too short \(2\)"):
        plan_shards(read(path), settings, 1, quiet)

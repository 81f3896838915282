from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
from speech_files import write_shards

from speechllm.data import selection as selection_module
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.plan import PlanSettings, plan_epoch
from speechllm.data.selection import (
    CostSettings,
    TextTokens,
    costs_at,
    estimated_tokens,
    populate,
    select,
    utterance_costs,
)

SETTINGS = CostSettings(
    prompt_tokens=5, characters_per_token=3.0, min_seconds=0.3, max_seconds=0.9, budget=200
)


def audio_tokens(samples: np.ndarray) -> np.ndarray:
    return -(-samples // 320)


def test_costs_count_audio_text_and_prompt() -> None:
    costs = utterance_costs(np.array([10, 20]), estimated_tokens(np.array([0, 7]), 3.0), 5)
    assert costs.tolist() == [15, 28]
    assert costs.dtype == np.int32


def test_select_gives_each_dropped_utterance_one_reason() -> None:
    selection = select(
        np.array([1.0, 0.05, 99.0, 1.0, 1.0, 0.05, 0.0]),
        np.array([5, 5, 5, 0, 5, 0, 5]),
        np.array([10, 10, 999, 10, 101, 10, 10]),
        min_seconds=0.1,
        max_seconds=60,
        budget=100,
    )
    assert selection.kept.tolist() == [0]
    assert {reason: d.tolist() for reason, d in selection.dropped.items()} == {
        "too_short": [1, 5, 6],
        "too_long": [2],
        "no_text": [3],
        "over_budget": [4],
    }


def test_an_utterance_of_no_length_is_too_short_also_without_a_minimum() -> None:
    selection = select(
        np.zeros(1), np.ones(1), np.ones(1), min_seconds=0, max_seconds=60, budget=10
    )
    assert selection.kept.tolist() == []
    assert selection.dropped["too_short"].tolist() == [0]


def test_a_cost_beyond_all_budgets_stays_one() -> None:
    costs = utterance_costs(np.array([2**40]), np.zeros(1, int), 5)
    assert costs.tolist() == [2**31 - 1]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus([str(write_shards(tmp_path / "s", 30, num_shards=4, seconds=(0.1, 1.2)))])


def test_a_population_is_what_its_parts_say(corpus: Corpus) -> None:
    found = populate(corpus, audio_tokens, SETTINGS)
    samples = np.ceil(corpus.durations * 16_000).astype(np.int64)
    costs = utterance_costs(audio_tokens(samples), estimated_tokens(corpus.text_lengths, 3.0), 5)
    assert found.costs.tolist() == costs.tolist()
    kept = (corpus.durations >= 0.3) & (corpus.durations <= 0.9)
    assert 0 < kept.sum() < 30
    assert found.selection.kept.tolist() == np.flatnonzero(kept).tolist()
    assert sorted(found.selection.dropped) == ["no_text", "over_budget", "too_long", "too_short"]
    assert found.hours == pytest.approx(corpus.durations[kept].sum() / 3600)


def test_counted_texts_and_own_prompts_take_the_place_of_estimates(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = TextTokens(
        np.arange(30, dtype=np.int32), np.where(np.arange(30) % 3 == 0, 9, 0).astype(np.int32)
    )
    samples = np.rint(corpus.durations * 16_000).astype(np.int64)
    expected = audio_tokens(samples) + np.arange(30) + np.where(np.arange(30) % 3 == 0, 9, 5)
    assert costs_at(corpus, audio_tokens, SETTINGS, 16_000, texts).tolist() == expected.tolist()
    assert populate(corpus, audio_tokens, SETTINGS, texts).costs.tolist() == expected.tolist()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(selection_module, "SHARED_UTTERANCES", 1)
    for given in (None, texts, None):  # none of them is served another's
        found = populate(corpus, audio_tokens, SETTINGS, given)
        assert (found.costs.tolist() == expected.tolist()) == (given is not None)


def test_a_shared_population_is_the_same(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = populate(corpus, audio_tokens, SETTINGS)
    monkeypatch.setattr(selection_module, "SHARED_UTTERANCES", 1)
    counted = []

    def counting(samples: np.ndarray) -> np.ndarray:
        counted.append(len(samples))
        return audio_tokens(samples)

    wanted = PlanSettings(1, 200, 2, 10)
    plans = []
    for _ in range(2):
        found = populate(corpus, counting, SETTINGS)
        assert found.costs.tolist() == own.costs.tolist()
        assert found.selection.kept.tolist() == own.selection.kept.tolist()
        assert found.hours == own.hours
        for reason, numbers in own.selection.dropped.items():
            assert found.selection.dropped[reason].tolist() == numbers.tolist()
        plans.append(
            plan_epoch(
                corpus.shard_sizes, found.costs, found.selection.kept, wanted, 0, found.table
            )
        )
    assert counted.count(30) == 1  # besides what tells counters apart
    own_plan = plan_epoch(corpus.shard_sizes, own.costs, own.selection.kept, wanted, 0)
    for plan in plans:
        assert plan.flat().utterances.tolist() == own_plan.flat().utterances.tolist()


def test_another_counter_or_setting_is_not_served_anothers_costs(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(selection_module, "SHARED_UTTERANCES", 1)
    first = populate(corpus, audio_tokens, SETTINGS)
    second = populate(corpus, lambda samples: audio_tokens(samples) + 1, SETTINGS)
    assert (second.costs - first.costs == 1).all()
    longer = CostSettings(5, 3.0, 0.5, 0.9, 200)
    assert len(populate(corpus, audio_tokens, longer).selection.kept) < len(first.selection.kept)

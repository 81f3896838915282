from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_files import write_shards

from speechllm.config.data import Dataset
from speechllm.data.mixture import (
    Part,
    epoch_utterances,
    owners_of_shards,
    plan_mixture,
    spread,
    tempered_counts,
    times_heard,
)
from speechllm.data.plan import EpochPlan, PlanSettings, plan_epoch, plan_table
from speechllm.errors import ConfigError

sizes = st.integers(1, 60)


def part_of(size: int, per_epoch: int, name: str = "d", first: int = 0) -> Part:
    return Part(name, first + 3 * np.arange(size), per_epoch)


@given(sizes, st.integers(1, 200), st.integers(0, 50), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_epochs_take_their_number_and_all_utterances_equally_often(
    size: int, per_epoch: int, first: int, seed: int
) -> None:
    part = part_of(size, per_epoch)
    before = [times_heard(part, seed, e) for e in range(first)]
    heard = sum(before, np.zeros(size, np.int64))
    for epoch in range(first, first + 5):
        times = times_heard(part, seed, epoch)
        assert times.sum() == per_epoch
        heard += times
        assert heard.max() - heard.min() <= 1


def test_passes_and_data_sets_have_orders_of_their_own() -> None:
    def of(name: str, epoch: int, seed: int = 1) -> list[int]:
        return times_heard(part_of(200, 100, name), seed, epoch).tolist()

    assert of("a", 0) == of("a", 0)
    assert [x + y for x, y in zip(of("a", 0), of("a", 1), strict=True)] == [1] * 200
    for other in (of("a", 2), of("b", 0), of("a", 0, seed=2)):
        both = sum(x and y for x, y in zip(of("a", 0), other, strict=True))
        assert 30 < both < 70


def test_whole_numbers_of_passes_draw_nothing() -> None:
    for weight in (1, 2, 5):
        assert (times_heard(part_of(20, 20 * weight), 1, 3) == weight).all()


@given(st.lists(st.tuples(sizes, st.integers(1, 150)), min_size=1, max_size=4), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_data_set_in_its_proportion(
    shapes: list[tuple[int, int]], epoch: int
) -> None:
    # Utterances of the data sets alternate in the corpus.
    parts = [part_of(size, n, f"d{i}", first=i) for i, (size, n) in enumerate(shapes[:3])]
    taken = epoch_utterances(parts, 1, epoch)
    assert (np.diff(taken) >= 0).all()
    assert [(taken % 3 == i).sum() for i in range(len(parts))] == [p.per_epoch for p in parts]
    for i, part in enumerate(parts):
        assert set(taken[taken % 3 == i].tolist()) <= set(part.kept.tolist())


@given(st.lists(sizes, min_size=1, max_size=5), st.floats(1, 10))
@settings(max_examples=60, deadline=None)
def test_temperature(shapes: list[int], temperature: float) -> None:
    counts = tempered_counts(shapes, temperature)
    assert min(counts) >= 1
    assert sum(shapes) <= sum(counts) <= sum(shapes) + len(shapes)
    if min(counts) > 1:
        assert sum(counts) == sum(shapes)
        share = np.array(shapes) ** (1 / temperature)
        assert np.abs(counts - sum(shapes) * share / share.sum()).max() <= 1
    assert tempered_counts(shapes, 1) == shapes


def test_shares_at_some_temperatures() -> None:
    assert tempered_counts([100, 10_000], 2) == [918, 9_182]
    assert tempered_counts([100, 10_000], 1e9) == [5_050, 5_050]
    assert tempered_counts([1, 10**6], 1) == [1, 10**6]


def parts(
    datasets: dict[str, dict[str, object]], temperature: float | None = None, seconds: float = 36.0
) -> dict[str, int]:
    """What an epoch takes of two data sets, of which 90 and 10 utterances are kept."""
    configured = {n: Dataset.model_validate({"shards": ["x"], **d}) for n, d in datasets.items()}
    kept = np.arange(10, 110)
    planned = plan_mixture(
        configured, temperature, ("a", "b", "a"), np.array([60, 10, 40]), kept,
        np.full(110, seconds),
    ).parts  # fmt: skip
    assert np.concatenate([p.kept for p in planned]).tolist() == [*range(10, 60), *range(70, 110),
                                                                 *range(60, 70)]  # fmt: skip
    return {p.name: p.per_epoch for p in planned}


def test_weights_and_caps() -> None:
    assert parts({"b": {}, "a": {}}) == {"a": 90, "b": 10}
    assert parts({"a": {"weight": 0.5}, "b": {"weight": 3}}) == {"a": 45, "b": 30}
    assert parts({"a": {"weight": 0.001}, "b": {}}) == {"a": 1, "b": 10}
    assert parts({"a": {"max_utterances": 20}, "b": {"weight": 3}}) == {"a": 20, "b": 30}
    assert parts({"a": {"max_hours": 0.25}, "b": {"max_hours": 1}}) == {"a": 25, "b": 10}
    assert parts({"a": {"max_hours": 0.001}, "b": {}}) == {"a": 1, "b": 10}
    assert parts({"a": {}, "b": {}}, temperature=2) == {"a": 75, "b": 25}
    assert parts({"a": {}, "b": {"max_utterances": 12}}, temperature=2) == {"a": 75, "b": 12}


def test_a_data_set_without_utterances_is_refused() -> None:
    configured = {n: Dataset(shards=("x",)) for n in "ab"}
    with pytest.raises(ConfigError, match=r"data\.mixture\.b"):
        plan_mixture(configured, None, ("a", "b"), np.array([3, 3]), np.arange(3), np.ones(6))


def test_every_shard_belongs_to_one_data_set(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 4, num_shards=4)
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    one = {"a": Dataset(shards=(tars[1], tars[3])), "b": Dataset(shards=(tars[0], tars[2]))}
    owners = owners_of_shards(one)
    assert list(owners) == tars
    assert list(owners.values()) == ["b", "a", "b", "a"]
    two = {"all": Dataset(shards=(str(shards),)), "some": Dataset(shards=(tars[2],))}
    with pytest.raises(ConfigError, match=r"000002\.tar belongs to both all and some"):
        owners_of_shards(two)
    with pytest.raises(ConfigError, match=r"data\.mixture\.a\.shards: .*nowhere: no \*\.tar"):
        owners_of_shards({"a": Dataset(shards=(str(tmp_path / "nowhere"),))})


def spread_plan(times: np.ndarray, shard_sizes: np.ndarray, costs: np.ndarray) -> EpochPlan:
    wanted = PlanSettings(seed=1, microbatch_tokens=300, microbatches_per_step=4, window=100)
    utterances, sizes = spread(np.repeat(np.arange(len(times)), times), shard_sizes)
    everyone = np.arange(len(utterances))
    table = plan_table(sizes, costs[utterances], everyone, wanted.microbatch_tokens)
    return EpochPlan(costs, utterances, table, wanted, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_repeats_are_spread_and_planned_as_often_as_they_are_heard(
    times: list[int], shards: int
) -> None:
    heard = np.array(times)
    shard_sizes = np.diff(np.linspace(0, len(heard), shards + 1).astype(int))
    taken = np.repeat(np.arange(len(heard)), heard)
    utterances, sizes = spread(taken, shard_sizes)
    assert sizes.sum() == len(utterances) == heard.sum()
    assert sorted(utterances.tolist()) == taken.tolist()
    for inside in np.split(utterances, np.cumsum(sizes)[:-1]):
        assert (np.diff(inside) > 0).all(), "no shard holds an utterance twice"
    if heard.any():
        plan = spread_plan(heard, shard_sizes, 20 + np.arange(len(heard)) % 50)
        planned = np.concatenate([m for k in range(plan.num_steps) for m in plan.step(k)])
        assert np.bincount(planned, minlength=len(heard)).tolist() == times


def test_without_repeats_the_plan_is_the_plain_one() -> None:
    sizes, costs = np.array([40, 0, 30, 30]), 20 + np.arange(100) * 7 % 50
    kept = np.delete(np.arange(100), [3, 77])
    wanted = PlanSettings(seed=1, microbatch_tokens=300, microbatches_per_step=4, window=100)
    plain = plan_epoch(sizes, costs, kept, wanted, 0)
    mixed = spread_plan(np.bincount(kept, minlength=100), sizes, costs)
    assert plain.num_steps == mixed.num_steps > 2
    for k in range(plain.num_steps):
        assert [m.tolist() for m in plain.step(k)] == [m.tolist() for m in mixed.step(k)]


def test_repeats_seldom_meet_in_a_step() -> None:
    shard_sizes, costs = np.full(40, 50), 20 + np.arange(2_000) * 7 % 50
    plan = spread_plan(np.full(2_000, 3), shard_sizes, costs)
    steps = [np.concatenate(plan.step(k)) for k in range(plan.num_steps)]
    met = sum(len(step) - len(set(step.tolist())) for step in steps)
    assert met < 0.1 * 6_000

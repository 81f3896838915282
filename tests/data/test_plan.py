import hashlib
from dataclasses import dataclass, replace

import numpy as np

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.data.plan import (
    EpochPlan,
    PlanSettings,
    plan_epoch,
    plan_in_order,
    rank_share,
    select,
    shard_windows,
    utterance_costs,
)


@dataclass
class Case:
    shard_sizes: np.ndarray
    costs: np.ndarray
    kept: np.ndarray
    settings: PlanSettings
    epoch: int

    def plan(self, **changes: int) -> EpochPlan:
        epoch = changes.pop("epoch", self.epoch)
        wanted = replace(self.settings, **changes)
        return plan_epoch(self.shard_sizes, self.costs, self.kept, wanted, epoch)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 7, 40]), min_size=1, max_size=7))
    longest = draw(st.integers(1, 60))
    budget = draw(st.integers(longest, 400))
    costs = draw(
        st.lists(st.integers(1, longest + 20), min_size=sum(sizes), max_size=sum(sizes)).map(
            lambda values: np.array(values, dtype=np.int64)
        )
    )
    return Case(
        np.array(sizes),
        costs,
        np.flatnonzero(costs <= budget),
        PlanSettings(
            seed=draw(st.integers(0, 3)),
            microbatch_tokens=budget,
            microbatches_per_step=draw(st.integers(1, 9)),
            window=draw(st.integers(1, 120)),
        ),
        draw(st.integers(0, 3)),
    )


def steps_of(plan: EpochPlan) -> list[list[list[int]]]:
    return [[m.tolist() for m in plan.step(k)] for k in range(plan.num_steps)]


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_kept_utterance_exactly_once_in_the_budget_in_steps_of_m(case: Case) -> None:
    plan = case.plan()
    steps = steps_of(plan)
    flat = [u for step in steps for microbatch in step for u in microbatch]
    assert sorted(flat) == case.kept.tolist()
    padded = [len(m) * int(case.costs[m].max()) for step in steps for m in step]
    assert all(p <= case.settings.microbatch_tokens for p in padded)
    assert plan.positions.tolist() == padded
    if flat:
        assert plan.padding_fraction == pytest.approx(1 - case.costs[flat].sum() / sum(padded))
    per_step = case.settings.microbatches_per_step
    for step in steps[:-1]:
        assert len(step) == per_step
    if steps:
        assert len(steps[-1]) == min(per_step, sum(len(m) for m in steps[-1]))
    assert plan.num_microbatches == sum(len(step) for step in steps)


@given(cases(), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_ranks_share_the_same_global_steps_with_equal_counts(case: Case, world: int) -> None:
    for microbatches in steps_of(case.plan()):
        shares = [rank_share(len(microbatches), rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        own = [m for share in shares for m, is_repeat in share if not is_repeat]
        assert sorted(own) == list(range(len(microbatches)))
        for rank, share in enumerate(shares):
            assert all(0 <= m < len(microbatches) for m, _ in share)
            mine = [m for m, is_repeat in share if not is_repeat]
            assert mine == list(range(rank, len(microbatches), world))
            assert all(m == mine[-1] for m, is_repeat in share if is_repeat and mine)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_a_microbatch_holds_utterances_of_its_window_or_carried_into_it(case: Case) -> None:
    windows = shard_windows(case.shard_sizes, case.kept, case.settings, case.epoch)
    plan = case.plan()
    window_of = {u: w for w, window in enumerate(windows) for u in window.tolist()}
    assert len(window_of) == len(case.kept)
    newest = [max(window_of[u] for m in step for u in m) for step in steps_of(plan)]
    for w in range(len(windows)):
        # Before any later window is touched, all but what does not fill a step is done.
        touched = next((k for k, n in enumerate(newest) if n > w), plan.num_steps)
        done = {int(u) for k in range(touched) for m in plan.step(k) for u in m}
        left = [u for u in window_of if window_of[u] <= w and u not in done]
        carried = plan_in_order(case.costs, np.array(left, int), case.settings.microbatch_tokens)
        assert len(carried) <= case.settings.microbatches_per_step


@given(cases())
@settings(max_examples=100, deadline=None)
def test_windows_are_whole_shards_and_about_as_long_as_asked(case: Case) -> None:
    windows = shard_windows(case.shard_sizes, case.kept, case.settings, case.epoch)
    shard_of = np.repeat(np.arange(len(case.shard_sizes)), case.shard_sizes)
    shards = [set(shard_of[window].tolist()) for window in windows]
    assert sum(len(s) for s in shards) == len(set().union(*shards))
    for window in windows:
        last = shard_of[window[-1]]
        assert len(window) - int((shard_of[window] == last).sum()) < case.settings.window
    assert np.sort(np.concatenate([np.empty(0, int), *windows])).tolist() == case.kept.tolist()


def corpus(count: int, seed: int = 0) -> Case:
    """Lengths as in LibriSpeech: most just under 16 s, a flat tail down to 1.3 s."""
    random = np.random.default_rng(seed)
    long = random.normal(14.5, 1.2, count)
    seconds = np.where(random.random(count) < 0.75, long, random.uniform(1.3, 14, count))
    seconds = seconds.clip(1.3, 35)
    costs = utterance_costs(np.ceil(seconds * 50 / 6), np.floor(seconds * 15), 30, 3.0)
    sizes = np.full(count // 500, 500)
    return Case(sizes, costs, np.arange(count), PlanSettings(1, 4096, 8, 10_000), 0)


def test_padding_is_low_and_the_microbatches_of_a_step_cost_alike() -> None:
    case = corpus(60_000)
    plan = case.plan()
    assert plan.padding_fraction < 0.01
    positions = [
        plan.positions[a:b]
        for a, b in np.lib.stride_tricks.sliding_window_view(plan.step_starts, 2)
    ]
    spread = [p.max() / p.mean() for p in positions]
    assert np.mean(spread) < 1.01
    assert max(spread) < 1.15
    assert np.mean([p.mean() for p in positions]) > 0.95 * case.settings.microbatch_tokens


def test_epochs_and_seeds_differ_and_the_same_arguments_repeat() -> None:
    case = corpus(3_000)
    first = steps_of(case.plan())
    assert first == steps_of(case.plan())
    for other in (case.plan(epoch=1), case.plan(seed=2)):
        assert steps_of(other) != first
        together = {tuple(sorted(m)) for step in first for m in step}
        again = {tuple(sorted(m)) for step in steps_of(other) for m in step}
        assert len(together & again) < 0.1 * len(together)


def test_within_one_shard_other_utterances_meet_in_each_epoch() -> None:
    case = replace(corpus(3_000), shard_sizes=np.array([3_000]))
    first, second = (
        {tuple(sorted(m)) for step in steps_of(case.plan(epoch=e)) for m in step} for e in (0, 1)
    )
    assert len(first & second) < 0.1 * len(first)


def test_steps_are_shuffled_by_cost() -> None:
    plan = corpus(3_000).plan()
    longest = [int(plan.step(k)[0][0]) for k in range(plan.num_steps - 1)]
    costs = corpus(3_000).costs[longest]
    assert (np.diff(costs) > 0).any()
    assert (np.diff(costs) < 0).any()


def test_kept_in_another_order_and_dtype_gives_the_same_plan() -> None:
    case = corpus(1_000)
    shuffled = np.random.default_rng(3).permutation(case.kept).astype(np.int32)
    other = replace(case, kept=shuffled, costs=case.costs.astype(np.int32))
    assert steps_of(other.plan()) == steps_of(case.plan())


def test_the_order_of_released_runs_stays() -> None:
    """A run that was saved by an earlier version must resume into the same order."""
    digest = hashlib.sha256()
    costs = 30 + np.arange(4_000) * 7919 % 211
    for epoch in (0, 1):
        plan = plan_epoch(
            np.full(8, 500), costs, np.arange(4_000), PlanSettings(1, 4096, 8, 1_000), epoch
        )
        for array in (plan.utterances, plan.microbatch_starts, plan.step_starts):
            digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "09e77ac87bb2c54c"


def test_fewer_utterances_than_microbatches_of_a_step() -> None:
    costs = np.array([5, 9, 7])
    plan = plan_epoch(np.array([3]), costs, np.arange(3), PlanSettings(0, 100, 8, 10), 0)
    assert plan.num_steps == 1
    assert [m.tolist() for m in plan.step(0)] == [[1], [2], [0]]


def test_the_last_step_is_cut_into_m_microbatches_of_like_cost() -> None:
    costs = np.full(30, 10)
    plan = plan_epoch(np.array([30]), costs, np.arange(30), PlanSettings(0, 100, 4, 50), 0)
    assert [len(m) for m in plan.step(0)] == [8, 8, 8, 6]


def test_no_utterances_and_empty_shards() -> None:
    for sizes in ([], [0], [0, 0]):
        nothing = np.empty(0, dtype=np.int64)
        plan = plan_epoch(np.array(sizes, int), nothing, nothing, PlanSettings(0, 10, 2, 5), 0)
        assert plan.num_steps == 0
        assert plan.padding_fraction == 0
        with pytest.raises(IndexError):
            plan.step(0)


def test_costs_count_audio_text_and_prompt() -> None:
    costs = utterance_costs(np.array([10, 20]), np.array([0, 7]), 5, 3.0)
    assert costs.tolist() == [15, 28]
    assert costs.dtype == np.int64


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


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_in_order_is_complete_longest_first_and_in_the_budget(
    values: list[int], budget: int
) -> None:
    costs = np.array(values, dtype=np.int64)
    kept = np.arange(len(costs))[::2]
    microbatches = plan_in_order(costs, kept, budget)
    flat = [int(u) for m in microbatches for u in m]
    assert sorted(flat) == kept.tolist()
    assert np.all(np.diff(costs[flat]) <= 0)
    for microbatch in microbatches:
        padded = len(microbatch) * costs[microbatch].max()
        assert padded <= budget or len(microbatch) == 1

import hashlib
import itertools
from dataclasses import dataclass, replace

import numpy as np

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.data import plan as plan_module
from speechllm.data.cut import cut, microbatches_by_rows
from speechllm.data.plan import (
    EpochPlan,
    PlanSettings,
    plan_epoch,
    plan_in_order,
    rank_share,
)
from speechllm.data.selection import utterance_costs


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
            lambda values: np.array(values, dtype=np.int32)
        )
    )
    kept = np.flatnonzero(costs <= budget)
    often = draw(st.sampled_from([(1,), (0, 1, 1, 2), (3, 1)]))
    return Case(
        np.array(sizes),
        costs,
        np.repeat(kept, np.resize(often, len(kept))),
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
@settings(max_examples=120, deadline=None)
def test_every_utterance_as_often_as_it_is_kept_in_the_budget_in_steps_of_m(case: Case) -> None:
    plan = case.plan()
    steps = steps_of(plan)
    flat = [u for step in steps for microbatch in step for u in microbatch]
    assert sorted(flat) == case.kept.tolist()
    padded = [len(m) * int(case.costs[m].max()) for step in steps for m in step]
    assert all(p <= case.settings.microbatch_tokens for p in padded)
    per_step = case.settings.microbatches_per_step
    for step in steps[:-1]:
        assert len(step) == per_step
    if steps:
        assert len(steps[-1]) == min(per_step, sum(len(m) for m in steps[-1]))
    assert plan.num_microbatches == sum(len(step) for step in steps)
    assert 0 <= plan.padding_fraction < 1
    whole = plan.flat()
    assert whole.utterances.tolist() == flat
    assert whole.positions.tolist() == padded
    assert np.diff(whole.step_starts).tolist() == [len(step) for step in steps]
    assert [whole.microbatch(m).tolist() for m in range(len(padded))] == [
        m for step in steps for m in step
    ]
    if case.kept.size and plan.num_windows == 1:
        least = int(case.costs[case.kept].min())
        padding = plan.padding_fraction
        for prefix in (0, least - 1, least // 2):  # as many positions are padding, of fewer
            behind = plan.padding_behind(prefix)
            assert behind >= padding
            assert (behind > padding) == (padding > 0 and prefix > 0)
    if flat:
        assert whole.padding_fraction == pytest.approx(1 - case.costs[flat].sum() / sum(padded))


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_any_step_first_gives_what_all_in_order_give(case: Case, random) -> None:  # type: ignore[no-untyped-def]
    expected = steps_of(case.plan())
    order = list(range(len(expected)))
    random.shuffle(order)
    plan = case.plan()
    assert plan.num_steps == len(expected)
    for k in order[:20]:
        assert [m.tolist() for m in plan.step(k)] == expected[k]
        assert [m.tolist() for m in case.plan().step(k)] == expected[k]


@given(cases())
@settings(max_examples=100, deadline=None)
def test_microbatches_are_counted_as_they_are_cut(case: Case) -> None:
    budget = case.settings.microbatch_tokens
    ordered = np.sort(case.costs[case.kept])[::-1].astype(np.int64)
    starts = cut(ordered.tolist(), budget) if len(ordered) else []
    rows, counts = np.unique(budget // ordered, return_counts=True)
    made = microbatches_by_rows(counts[None], rows)[0]
    assert np.repeat(rows, made).tolist() == (budget // ordered[starts]).tolist()


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
def test_steps_follow_the_windows_and_less_than_a_step_waits(case: Case) -> None:
    plan = case.plan()
    windows = [plan.window_utterances(w).tolist() for w in range(plan.num_windows)]
    window_of = {u: w for w, window in enumerate(windows) for u in window}
    steps = steps_of(plan)
    last_is_cut_anew = plan.num_steps > int(plan._first_step[-1])
    newest, made = [], []
    for step in steps[: len(steps) - last_is_cut_anew]:
        assert all(len({window_of[u] for u in m}) == 1 for m in step)
        of_step = [window_of[m[0]] for m in step]
        newest.append(max(of_step))
        made += of_step
    assert newest == sorted(newest)
    for w in range(plan.num_windows):
        # Before a later window is touched, all but what does not fill a step is done.
        touched = next((k for k, n in enumerate(newest) if n > w), len(newest))
        done = sorted(u for step in steps[:touched] for m in step for u in m)
        until = sorted(u for window in windows[: w + 1] for u in window)
        waiting = len(until) - len(done)
        most = max((len(m) for step in steps for m in step), default=0)
        assert waiting <= most * (case.settings.microbatches_per_step - 1) or last_is_cut_anew


@given(cases())
@settings(max_examples=100, deadline=None)
def test_windows_are_whole_shards_and_about_as_long_as_asked(case: Case) -> None:
    plan = case.plan()
    assert plan.window >= case.settings.window
    windows = [plan.window_utterances(w) for w in range(plan.num_windows)]
    shard_of = np.repeat(np.arange(len(case.shard_sizes)), case.shard_sizes)
    shards = [set(shard_of[window].tolist()) for window in windows]
    assert sum(len(s) for s in shards) == len(set().union(*shards))
    for window in windows:
        if len(window):
            of_shard = shard_of[window]
            assert len(window) - int((of_shard == of_shard[-1]).sum()) < plan.window
    assert np.sort(np.concatenate([np.empty(0, int), *windows])).tolist() == case.kept.tolist()


def corpus(count: int, seed: int = 0) -> Case:
    """Lengths as in LibriSpeech: most just under 16 s, a flat tail down to 1.3 s."""
    random = np.random.default_rng(seed)
    long = random.normal(14.5, 1.2, count)
    seconds = np.where(random.random(count) < 0.75, long, random.uniform(1.3, 14, count))
    seconds = seconds.clip(1.3, 35)
    costs = utterance_costs(np.ceil(seconds * 50 / 6), np.ceil(np.floor(seconds * 15) / 3), 30)
    sizes = np.full(count // 500, 500)
    return Case(sizes, costs, np.arange(count), PlanSettings(1, 4096, 8, 10_000), 0)


@pytest.mark.parametrize(("per_step", "count"), [(8, 60_000), (64, 60_000), (1024, 281_000)])
def test_padding_is_low_and_the_microbatches_of_a_step_cost_alike(
    per_step: int, count: int
) -> None:
    case = corpus(count)
    plan = case.plan(microbatches_per_step=per_step)
    whole = plan.flat()
    assert whole.padding_fraction < 0.01
    assert plan.padding_fraction == pytest.approx(whole.padding_fraction, abs=0.002)
    starts = whole.step_starts
    positions = [whole.positions[a:b] for a, b in itertools.pairwise(starts)]
    spread = [p.max() / p.mean() for p in positions]
    assert np.mean(spread) < 1.03
    assert np.mean(whole.positions) > 0.95 * case.settings.microbatch_tokens


def test_a_large_step_makes_its_window_larger() -> None:
    case = corpus(60_000)
    assert case.plan().window == 10_000
    plan = case.plan(microbatches_per_step=256)
    assert plan.window > 10_000
    per_window = plan.num_microbatches * plan.window / 60_000 / 256
    assert per_window == pytest.approx(plan_module.STEPS_PER_WINDOW, rel=0.03)


def test_a_step_in_the_middle_looks_at_few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = corpus(60_000)
    cut_windows = []
    usual = EpochPlan._cut_window

    def watched(plan: EpochPlan, w: int) -> plan_module._Window:
        cut_windows.append(w)
        return usual(plan, w)

    monkeypatch.setattr(EpochPlan, "_cut_window", watched)
    plan = replace(
        case, settings=replace(case.settings, window=1_000, microbatches_per_step=4)
    ).plan()
    assert plan.num_windows == 60
    assert not cut_windows
    for k in range(0, plan.num_steps, 7):
        cut_windows.clear()
        case_plan = replace(
            case, settings=replace(case.settings, window=1_000, microbatches_per_step=4)
        ).plan()
        case_plan.step(k)
        assert len(set(cut_windows)) <= 8
    cut_windows.clear()
    steps_of(plan)
    assert len(cut_windows) == 60


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


def test_another_dtype_gives_the_same_plan() -> None:
    case = corpus(1_000)
    other = replace(case, kept=case.kept.astype(np.int32), costs=case.costs.astype(np.int64))
    assert steps_of(other.plan()) == steps_of(case.plan())


def test_the_order_of_released_runs_stays() -> None:
    """A run that was saved by an earlier version must resume into the same order, or be refused:
    with another digest comes another `plan.ORDER`."""
    digest = hashlib.sha256()
    costs = 30 + np.arange(4_000) * 7919 % 211
    for epoch in (0, 1):
        plan = plan_epoch(
            np.full(8, 500), costs, np.arange(4_000), PlanSettings(1, 4096, 8, 1_000), epoch
        ).flat()
        for array in (plan.utterances, plan.microbatch_starts, plan.step_starts):
            digest.update(array.astype("<i8").tobytes())
    assert (plan_module.ORDER, digest.hexdigest()[:16]) == (2, "a3d315ac9ad303e9")


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

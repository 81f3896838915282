"""The order of the data: which utterances make which microbatch of which step, as pure functions.

An epoch's plan depends on (seed, epoch, index, budget, M, window) and on nothing else: not on the
number of ranks or workers, and not on earlier epochs. The state of the data is (epoch, step), and
any step can be asked for: only its own window of the corpus, at times with one or two before it, is
looked at.

That works because a window can be counted without being sorted. A microbatch whose longest
utterance costs c has budget // c rows, so how many microbatches a window makes follows from how
many of its utterances have which `budget // cost`: a short histogram, which is the sum of those
of the window's shards.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from speechllm.data.cut import cut, cut_evenly, microbatches_by_rows
from speechllm.data.plan_table import PlanTable, plan_table, totals

# What an order that was planned before can be told by: another number, another order.
ORDER = 2
# Utterances whose costs differ by less than this part meet in other microbatches in each epoch.
# Padding at LibriSpeech-like lengths, budget 4,096: 0.1 % without, 0.3 % at 1 %, 0.8 % at 2 %.
COST_JITTER = 0.01
# A window holds at least so many steps, or its steps would hold microbatches of all costs.
STEPS_PER_WINDOW = 8
# Among so many steps of like utterances, microbatches of like positions meet in one step.
STEPS_PER_BAND = 4
# A joint step takes from three windows in the mean, and seldom from many.
_WINDOWS_REMEMBERED = 2
_LEFT_OVERS_REMEMBERED = 16
_PADDING_WINDOWS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class PlanSettings:
    """What an epoch's order depends on, besides the corpus.

    microbatch_tokens: budget of a microbatch in LLM positions, padding included.
    microbatches_per_step: M, over all ranks together. window: utterances bucketed together; where
    8 steps take more than that, so many.
    """

    seed: int
    microbatch_tokens: int
    microbatches_per_step: int
    window: int


@dataclass(frozen=True, eq=False)
class FlatPlan:
    """All steps of one epoch, as flat arrays.

    utterances: int64, utterance numbers in the order of the epoch.
    microbatch_starts: int64, where in `utterances` each microbatch starts, and at last their count.
    step_starts: int64, where in the microbatches each step starts, and at last their count.
    positions: int64, LLM positions of each microbatch, padding included (rows x longest row).
    padding_fraction: part of all positions that is padding.
    """

    utterances: np.ndarray
    microbatch_starts: np.ndarray
    step_starts: np.ndarray
    positions: np.ndarray
    padding_fraction: float

    def microbatch(self, m: int) -> np.ndarray:
        return self.utterances[self.microbatch_starts[m] : self.microbatch_starts[m + 1]]


@dataclass(frozen=True, eq=False)
class _Window:
    """One window, cut. utterances: sorted, longest first. starts: of each microbatch, and the end.
    positions: of each microbatch. own: int64 [steps, M], microbatches of the steps of its own; the
    microbatches after them are left over. order: of the steps, a joint step being the last number.
    """

    utterances: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    own: np.ndarray
    order: np.ndarray

    def microbatch(self, m: int) -> np.ndarray:
        return self.utterances[self.starts[m] : self.starts[m + 1]]


class EpochPlan:
    """The steps of one epoch, each of them made when it is asked for.

    costs: int [U], LLM positions of each utterance. kept: int64, ascending, the utterances to train
    on, as often as they are trained on. table: of these two. `window` is the size of a window in
    utterances: it is cut before the first shard that starts at or beyond each multiple of it.
    """

    def __init__(
        self,
        costs: np.ndarray,
        kept: np.ndarray,
        table: PlanTable,
        settings: PlanSettings,
        epoch: int,
    ) -> None:
        self._costs, self._kept, self._table = costs, kept, table
        self._settings, self._epoch = settings, epoch
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._left_overs: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        per_step = settings.microbatches_per_step
        sizes = np.diff(table.bounds)
        order = np.argsort(_random(settings.seed, epoch, (0,), len(sizes)), kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        self.window = _window_size(table, settings)
        of_shard = before // self.window
        first = np.flatnonzero(np.diff(of_shard, prepend=-1))
        self._shards = np.split(order, first[1:]) if len(order) else []
        histogram_WD = np.add.reduceat(table.counts[order], first, axis=0, dtype=np.int64)
        self._cuts = microbatches_by_rows(histogram_WD, table.rows)
        made = self._cuts.sum(axis=1)
        # A window has made // M steps of its own. What is left over of windows makes joint steps,
        # first come, first served, each of them in the window that completes it.
        self._made = made
        self._left_over = totals(made % per_step)
        self._first_step = totals(made) // per_step

    @property
    def num_steps(self) -> int:
        last = self._left_over[-1] % self._settings.microbatches_per_step > 0
        return int(self._first_step[-1]) + int(last)

    @property
    def num_utterances(self) -> int:
        """As often as each is trained on."""
        return int(self._table.bounds[-1])

    @property
    def num_microbatches(self) -> int:
        full = int(self._first_step[-1])
        last = len(self._last_step()) if self.num_steps > full else 0
        return full * self._settings.microbatches_per_step + last

    @property
    def num_windows(self) -> int:
        return len(self._shards)

    def step(self, k: int) -> list[np.ndarray]:
        """The microbatches of step `k`: M arrays of utterance numbers, longest utterances first.

        Only the last step of an epoch may have fewer than M: where fewer than M utterances are
        left, each is a microbatch of its own.
        """
        if not 0 <= k < self.num_steps:
            raise IndexError(f"step {k} of an epoch of {self.num_steps} steps")
        if k == self._first_step[-1]:
            return self._last_step()
        w = int(np.searchsorted(self._first_step, k, side="right")) - 1
        window = self._window(w)
        number = int(window.order[k - self._first_step[w]])
        if number < len(window.own):
            return [window.microbatch(m) for m in window.own[number]]
        per_step = self._settings.microbatches_per_step
        joint = int(self._left_over[w + 1]) // per_step - 1
        return self._left(joint * per_step, (joint + 1) * per_step)

    def window_utterances(self, w: int) -> np.ndarray:
        """The utterances of one window as they stand in `kept`, shard after shard."""
        bounds = self._table.bounds
        parts = [self._kept[bounds[s] : bounds[s + 1]] for s in self._shards[w]]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)

    @property
    def padding_fraction(self) -> float:
        """Part of all positions that is padding, measured on four windows, evenly spaced."""
        return self.padding_behind(0)

    def padding_behind(self, prefix: int) -> float:
        """As `padding_fraction`, where so many positions of each row are there and are not run."""
        count = min(_PADDING_WINDOWS, self.num_windows)
        windows = [self._window(i * self.num_windows // count) for i in range(count)]
        positions = sum(int(window.positions.sum()) for window in windows)
        costs = sum(int(self._costs[window.utterances].sum()) for window in windows)
        not_run = prefix * sum(len(window.utterances) for window in windows)
        return (positions - costs) / (positions - not_run) if positions else 0.0

    def flat(self) -> FlatPlan:
        """The whole epoch at once: about 0.4 s and 15 MB for each million utterances."""
        steps = [self.step(k) for k in range(self.num_steps)]
        microbatches = [m for step in steps for m in step]
        sizes = np.array([len(m) for m in microbatches], dtype=np.int64)
        starts = totals(sizes)
        utterances = np.concatenate([np.empty(0, np.int64), *microbatches])
        step_starts = totals(np.array([len(step) for step in steps], dtype=np.int64))
        costs = self._costs[utterances]
        positions = sizes * np.maximum.reduceat(costs, starts[:-1]) if len(sizes) else sizes
        padding = 1 - costs.sum() / positions.sum() if len(sizes) else 0.0
        return FlatPlan(utterances, starts, step_starts, positions, float(padding))

    def _window(self, w: int) -> _Window:
        if w not in self._windows:
            window = self._cut_window(w)
            _remember(self._windows, w, window, _WINDOWS_REMEMBERED)
            # Copies, so that they do not hold the window.
            rest = [window.microbatch(m).copy() for m in range(window.own.size, self._made[w])]
            _remember(self._left_overs, w, rest, _LEFT_OVERS_REMEMBERED)
        return self._windows[w]

    def _cut_window(self, w: int) -> _Window:
        budget, per_step = self._settings.microbatch_tokens, self._settings.microbatches_per_step
        utterances = self.window_utterances(w)
        costs = self._costs[utterances].astype(np.int64)
        steps = int(self._first_step[w + 1] - self._first_step[w])
        stream = (1, w)
        raw = _random(self._settings.seed, self._epoch, stream, len(utterances) + steps)
        u = _uniform(raw[: len(utterances)])
        # No utterance gets past a longer one that fewer rows of fit into the budget.
        longest = budget // (budget // costs)
        key = np.minimum(costs * (1 + COST_JITTER * u), longest + u)
        by_cost = np.argsort(-key, kind="stable")
        utterances, costs = utterances[by_cost], costs[by_cost]
        starts = totals(np.repeat(self._table.rows, self._cuts[w]))
        starts[-1] = len(utterances)
        positions = np.diff(starts) * np.maximum.reduceat(costs, starts[:-1])
        own = _steps_of_like_microbatches(positions, int(self._made[w]) // per_step, per_step)
        order = np.argsort(raw[len(utterances) :], kind="stable")
        return _Window(utterances, starts, positions, own, order)

    def _left(self, first: int, end: int) -> list[np.ndarray]:
        """Of the microbatches that windows leave over, in their order, those from first to end."""
        found: list[np.ndarray] = []
        w = int(np.searchsorted(self._left_over, first, side="right")) - 1
        while first + len(found) < end:
            if w not in self._left_overs:
                self._window(w)
            begin = int(self._left_over[w])
            found += self._left_overs[w][max(0, first - begin) : end - begin]
            w += 1
        return found

    def _last_step(self) -> list[np.ndarray]:
        per_step = self._settings.microbatches_per_step
        end = int(self._left_over[-1])
        rest = np.concatenate(self._left(end - end % per_step, end))
        return cut_evenly(rest, self._costs, self._settings.microbatch_tokens, per_step)


def plan_epoch(
    shard_sizes: np.ndarray,
    costs: np.ndarray,
    kept: np.ndarray,
    settings: PlanSettings,
    epoch: int,
    table: PlanTable | None = None,
) -> EpochPlan:
    """The order of one epoch: every kept utterance exactly as often as it is listed.

    Shards are permuted and grouped into windows. A window's utterances are sorted by cost (with a
    little jitter) and cut into microbatches from the longest; M of like positions make a step, and
    the steps of the window are shuffled. Microbatches that do not fill a step wait for those of the
    next windows. The last step of the epoch holds what is left, cut into M microbatches anew.

    Args:
        shard_sizes: int64 [num_shards], utterances of each shard; utterances are numbered through.
        costs: int [U], LLM positions of each utterance, at least 1.
        kept: int64, ascending: utterances to train on, each of them at most
            `settings.microbatch_tokens`. One that is there twice is trained on twice.
        table: `plan_table` of the other arguments, where it is known already.
    """
    if table is None:
        table = plan_table(shard_sizes, costs, kept, settings.microbatch_tokens)
    return EpochPlan(costs, kept, table, settings, epoch)


def plan_in_order(costs: np.ndarray, kept: np.ndarray, budget: int) -> list[np.ndarray]:
    """Microbatches for evaluation and decoding: longest first, under the budget, deterministic.

    An utterance that is over the budget by itself stands alone in its microbatch.
    """
    if not len(kept):
        return []
    ordered = kept[np.lexsort((kept, -costs[kept]))]
    return np.split(ordered, cut(costs[ordered].tolist(), budget)[1:])


def rank_share(num_microbatches: int, rank: int, world: int) -> list[tuple[int, bool]]:
    """What `rank` of `world` runs of a step: (index of the microbatch, whether it is a repeat).

    Microbatches rank, rank + world, ...; the list has the same length on every rank. A rank that is
    short repeats its last microbatch; one that has none repeats another rank's.
    """
    own = list(range(rank, num_microbatches, world))
    rounds = -(-num_microbatches // world)
    repeated = own[-1] if own else rank % max(1, num_microbatches)
    return [(m, False) for m in own] + [(repeated, True)] * (rounds - len(own))


def _window_size(table: PlanTable, settings: PlanSettings) -> int:
    utterances = int(table.bounds[-1])
    made = int(
        microbatches_by_rows(table.counts.sum(axis=0, dtype=np.int64)[None], table.rows).sum()
    )
    wanted = STEPS_PER_WINDOW * settings.microbatches_per_step * utterances
    return max(settings.window, -(-wanted // max(1, made)))


def _remember(memory: OrderedDict[int, T], key: int, value: T, most: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > most:
        memory.popitem(last=False)


def _steps_of_like_microbatches(positions: np.ndarray, steps: int, per_step: int) -> np.ndarray:
    """int64 [steps, M]: the first steps x M microbatches, which come longest utterances first.

    By utterances first, as encoder and LLM share the cost of a position by length; then by
    positions, which differ by a row (7 % of 15) between neighbours in length.
    """
    bands = max(1, steps // STEPS_PER_BAND)
    of_step = np.arange(steps) * bands // max(1, steps)
    order = np.lexsort((-positions[: steps * per_step], np.repeat(of_step, per_step)))
    return order.reshape(steps, per_step)


def _random(seed: int, epoch: int, stream: tuple[int, ...], count: int) -> np.ndarray:
    """uint64 [count]. Raw bits, because numpy keeps only these the same in all its versions."""
    sequence = np.random.SeedSequence([seed, epoch], spawn_key=stream)
    return np.random.PCG64(sequence).random_raw(count)


def _uniform(raw: np.ndarray) -> np.ndarray:
    """The upper 53 bits of each word as a float64 in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53

"""Which steps of an epoch the training benchmark goes through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechllm.config.performance import Performance
from speechllm.config.schema import Config
from speechllm.prepare import Split
from speechllm.training_data import epoch_plans


@dataclass(frozen=True)
class Sample:
    """A few steps in place of an epoch, for the loader: those of the epoch's plan, taken evenly
    from the one of the longest utterances to that of the shortest, so that lengths are those of the
    corpus and buckets as tight as in training. Under `preset: plain` the same utterances in the
    order and the batches that the preset gives them. An epoch of fewer steps is taken whole: the
    ways are compared by their seconds, so none may go through a step twice."""

    microbatches: tuple[tuple[np.ndarray, ...], ...]

    @classmethod
    def of(cls, config: Config, split: Split, steps: int) -> Sample:
        usual = config.model_copy(update={"performance": Performance()})
        plan = epoch_plans(usual, split)(0)
        every = [plan.step(k) for k in range(plan.num_steps)]
        every.sort(key=lambda step: -int(split.costs[step[0]].max()))
        steps = min(steps, len(every))
        chosen = [every[int((i + 0.5) * len(every) / steps)] for i in range(steps)]
        if config.performance.preset != "plain":
            return cls(tuple(map(tuple, chosen)))
        utterances = np.concatenate([part for step in chosen for part in step])
        order = epoch_plans(config, split)(0).flat().utterances
        batches = np.array_split(
            order[np.isin(order, utterances)],
            max(1, round(len(utterances) / config.performance.plain_utterances)),
        )
        together = config.data.microbatches_per_step
        groups = range(0, len(batches), together)
        return cls(tuple(tuple(batches[first : first + together]) for first in groups))

    @property
    def num_steps(self) -> int:
        return len(self.microbatches)

    def step(self, k: int) -> list[np.ndarray]:
        return list(self.microbatches[k])

"""A small corpus in memory, for what reads through a store without caring where it comes from."""

import itertools
import multiprocessing
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from transformers import AutoTokenizer

from speechllm.config.model import Prompt
from speechllm.data.loader import TrainLoader
from speechllm.data.plan import EpochPlan, PlanSettings, plan_epoch
from speechllm.data.prompt import Prompter
from speechllm.data.store import SILENCE
from speechllm.errors import AudioError
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import Batch, StepData, Utterance

SIZES = np.array([40, 0, 1, 70, 25])
COSTS = 20 + np.arange(SIZES.sum()) * 37 % 60


class MemoryStore:
    """Utterance i: i + 160 samples of value i, except for those that cannot be read."""

    def __init__(self, bad: dict[int, str] | None = None, silent: tuple[int, ...] = ()) -> None:
        self.bad = bad or {}
        self.silent = silent
        self.corpus = SimpleNamespace(location=self._location, cache=None)

    def _location(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(key=f"u{i}", shard=f"shard{i % 3}.tar")

    silence = SILENCE

    def read(self, i: int) -> Utterance:
        if i in self.bad:
            raise AudioError(f"u{i} in shard{i % 3}.tar: {self.bad[i]}")
        text = "" if i in self.silent else f"text {i}"
        return Utterance(f"u{i}", np.full(160 + i, i, dtype=np.int16), text)


def audio_tokens(samples: int) -> int:
    return -(-samples // 100)


def build_prompter(directory: Path) -> Prompter:
    """Of three plain texts; the tokenizer's padding is its end token."""
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_llm(directory, pad_is_eos=True))
    return Prompter(tokenizer, Prompt(kind="plain", texts=("a{audio}", "b{audio}", "c{audio}")), 5)


def plan_of(epoch: int, per_step: int = 5) -> EpochPlan:
    wanted = PlanSettings(seed=1, microbatch_tokens=300, microbatches_per_step=per_step, window=50)
    return plan_epoch(SIZES, COSTS, np.arange(SIZES.sum()), wanted, epoch)


def train_loader(prompter: Prompter, store: MemoryStore | None = None, **changes) -> TrainLoader:
    usual = {"rank": 0, "world": 1, "num_workers": 0, "prefetch": 2, "plan_of": plan_of}
    store = store or MemoryStore()
    return TrainLoader(store, prompter, audio_tokens, prompter.end_token_id, **usual | changes)


def take(loader: TrainLoader, count: int, epoch: int = 0, step: int = 0) -> list[StepData]:
    with closing(loader.steps(epoch, step)) as steps:
        return list(itertools.islice(steps, count))


def processes() -> set[int]:
    """Ids of the worker processes that live."""
    return {child.pid for child in multiprocessing.active_children()}


def content(batch: Batch) -> list[object]:
    return [batch.keys, *(t.tolist() for t in vars(batch).values() if isinstance(t, torch.Tensor))]


def facts(data: StepData) -> list[object]:
    """All that a step holds, comparable."""
    parts = [(m.index, m.weight, m.utterances, m.audio_seconds, m.bad) for m in data.microbatches]
    return [data.epoch, data.step, parts, [content(m.batch) for m in data.microbatches]]

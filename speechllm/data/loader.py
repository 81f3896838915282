"""From a plan to batches: reading, decoding, prompting and collating, by option in processes.

The order is that of the plan for every number of worker processes. Workers are forked once and live
as long as the iterator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from speechllm.data.ahead import fetched_ahead
from speechllm.data.augmenter import Augmenter
from speechllm.data.cache import BLOCK
from speechllm.data.collate import collate
from speechllm.data.plan import EpochPlan, rank_share
from speechllm.data.prompt import Prompter
from speechllm.data.sending import BatchMemory
from speechllm.data.store import Store
from speechllm.data.worker import begin_worker, signals_held
from speechllm.errors import DataError
from speechllm.types import (
    AudioSegment,
    BadUtterance,
    Example,
    Microbatch,
    Reference,
    SpecMasks,
    StepData,
    Utterance,
)

AudioTokens = Callable[[int], int]

# What each rank fetches of remote shards ahead of its workers, where there is a cache: enough to
# get over minutes of a cold storage, and together less than what the cache holds.
_AHEAD_BYTES = 4 << 30
_AHEAD_PART = 1 / 32
_AHEAD_THREADS = 8


class TrainLoader:
    """The endless steps of one rank.

    Args:
        store: where utterances are read.
        prompter: makes examples of them.
        audio_tokens: LLM positions that a number of samples takes.
        pad_id: any valid token id.
        plan_of: the plan of an epoch. Called once an epoch.
        rank: of `world` ranks, whose share of each step is read.
        num_workers: processes; 0 reads in this one.
        prefetch: microbatches that each process keeps ready.
        prompters: of each shard, where they differ.
        augmenter: of the audio.
    """

    def __init__(
        self,
        store: Store,
        prompter: Prompter,
        audio_tokens: AudioTokens,
        pad_id: int,
        plan_of: Callable[[int], EpochPlan],
        *,
        rank: int,
        world: int,
        num_workers: int,
        prefetch: int,
        prompters: Sequence[Prompter] = (),
        augmenter: Augmenter | None = None,
    ) -> None:
        self._reader = _Reader(
            store, prompter, audio_tokens, pad_id, prompters=prompters, augmenter=augmenter
        )
        self._plan_of = plan_of
        self._rank = rank
        self._world = world
        self._num_workers = num_workers
        self._prefetch = prefetch

    def steps(self, epoch: int, step: int) -> Generator[StepData, None, None]:
        """Steps from this cursor on, epoch after epoch without end.

        Nothing earlier is read or planned, so the step after a restart comes as fast as the first
        one. Closing the iterator ends the worker processes.

        A microbatch has weight 0, no utterances and no seconds where this rank only keeps step with
        the others (its last microbatch again) or where nothing of it could be read (silence).

        Raises:
            DataError: an epoch has no steps, or fewer than the cursor says.
        """
        tasks = _fetched_ahead(self._reader.store, self._tasks(epoch, step))
        mine: list[Microbatch] = []
        for task, microbatch in _read(self._reader, tasks, self._num_workers, self._prefetch):
            mine.append(_repeat(microbatch) if task.is_repeat else microbatch)
            if task.ends_step:
                mine += [_repeat(microbatch)] * (task.rounds - len(mine))
                yield StepData(task.epoch, task.step, mine)
                mine = []

    def read(self, epoch: int, utterances: np.ndarray) -> Microbatch:
        """These utterances as a microbatch of that epoch, read in this process."""
        return self._reader[_Task(epoch, 0, 0, utterances)][1]

    def _tasks(self, epoch: int, step: int) -> Iterator[_Task]:
        while True:
            plan = self._plan_of(epoch)
            if plan.num_steps == 0 or step > plan.num_steps:
                raise DataError(
                    f"step {step} of epoch {epoch} is asked for, which has {plan.num_steps} steps: "
                    "no utterance is left, or the data are not those that the run started with"
                )
            for k in range(step, plan.num_steps):
                microbatches = plan.step(k)
                share = rank_share(len(microbatches), self._rank, self._world)
                # One's own microbatch is not read again for a repeat.
                read = [s for s in share if not s[1]] or share
                for m, is_repeat in read:
                    ends_step = m == read[-1][0]
                    yield _Task(epoch, k, m, microbatches[m], is_repeat, ends_step, len(share))
            epoch, step = epoch + 1, 0


def read_batches(
    store: Store,
    prompter: Prompter,
    audio_tokens: AudioTokens,
    pad_id: int,
    microbatches: Sequence[np.ndarray],
    *,
    with_target: bool,
    pad_left: bool,
    num_workers: int,
    prefetch: int,
) -> Iterator[Microbatch]:
    """The given microbatches in their order, once, for evaluation and decoding.

    Args:
        microbatches: int64 arrays of utterance numbers.
        with_target: targets and labels too. Without, an empty text is no error.
        pad_left: padding goes before the examples, as generation needs it.
        num_workers: processes; 0 reads in this one.
        prefetch: microbatches that each process keeps ready.
    """
    reader = _Reader(store, prompter, audio_tokens, pad_id, with_target, pad_left)
    tasks = [_Task(0, 0, i, microbatch) for i, microbatch in enumerate(microbatches)]
    for _, microbatch in _read(reader, tasks, min(num_workers, len(tasks)), prefetch):
        yield microbatch


@dataclass(frozen=True)
class _Task:
    """One microbatch to read. rounds: microbatches of the step that this rank runs, repeats too."""

    epoch: int
    step: int
    index: int
    utterances: np.ndarray
    is_repeat: bool = False
    ends_step: bool = False
    rounds: int = 1


@dataclass(frozen=True)
class _Reader(Dataset[tuple[_Task, Microbatch]]):
    """What a worker process holds: from a task to a collated microbatch."""

    store: Store
    prompter: Prompter
    audio_tokens: AudioTokens
    pad_id: int
    with_target: bool = True
    pad_left: bool = False
    prompters: Sequence[Prompter] = ()
    augmenter: Augmenter | None = None
    memory: BatchMemory = field(default_factory=BatchMemory)

    def __getitem__(self, task: _Task) -> tuple[_Task, Microbatch]:
        examples: list[Example] = []
        references: list[Reference] = []
        bad: list[BadUtterance] = []
        for number in task.utterances.tolist():
            try:
                utterance, example = self._read(number, task.epoch)
                examples.append(example)
            except DataError as error:
                bad.append(self._bad(number, error))
                continue
            own = utterance.fields.get("id")
            name = utterance.key if own in (None, "") else str(own)
            references.append(Reference(number, name, utterance.text, utterance.duration))
        if not examples:
            silence = self.store.silence
            examples.append(self.prompter.example(silence, 0, with_target=self.with_target))
        batch = collate(
            examples,
            self.audio_tokens,
            pad_id=self.pad_id,
            pad_left=self.pad_left,
            memory=self.memory,
        )
        microbatch = Microbatch(
            index=task.index,
            weight=1.0 if references else 0.0,
            batch=batch,
            utterances=len(references),
            audio_seconds=sum(reference.duration for reference in references),
            references=tuple(references),
            bad=tuple(bad),
        )
        return task, microbatch

    def _bad(self, number: int, error: DataError) -> BadUtterance:
        corpus = self.store.corpus
        try:
            place = corpus.location(number)
        except DataError:  # its index cannot be opened any more
            shard = corpus.shards[corpus.shard_of(number)]
            return BadUtterance(f"utterance {number}", shard, str(error))
        reason = str(error).removeprefix(f"{place.key} in {place.shard}: ")
        return BadUtterance(place.key, place.shard, reason)

    def _read(self, number: int, epoch: int) -> tuple[Utterance, Example]:
        utterance = self.store.read(number)
        if self.with_target and not utterance.text.strip():
            raise DataError("the text is empty")
        masks = None
        if self.augmenter is not None:
            utterance, masks = self.augmenter(utterance, epoch)
        prompter = self.prompter
        if self.prompters:
            prompter = self.prompters[self.store.corpus.shard_of(number)]
        example = prompter.example(utterance, epoch, with_target=self.with_target)
        return utterance, example if masks is None else _with_masks(example, masks)


def _fetched_ahead(store: Store, tasks: Iterable[_Task]) -> Iterable[_Task]:
    cache = store.corpus.cache
    if cache is None:
        return tasks

    def blocks_of(task: _Task) -> set[tuple[str, int]]:
        return {block for i in task.utterances.tolist() for block in store.remote_blocks(i)}

    limit = min(_AHEAD_BYTES, int(cache.limit * _AHEAD_PART)) // BLOCK
    return fetched_ahead(tasks, blocks_of, store.keep_block, limit=limit, threads=_AHEAD_THREADS)


def _with_masks(example: Example, masks: SpecMasks) -> Example:
    segments = (
        replace(segment, masks=masks) if isinstance(segment, AudioSegment) else segment
        for segment in example.segments
    )
    return replace(example, segments=tuple(segments))


def _repeat(microbatch: Microbatch) -> Microbatch:
    return replace(microbatch, weight=0.0, utterances=0, audio_seconds=0.0, bad=())


def _read(
    reader: _Reader, tasks: Iterable[_Task], num_workers: int, prefetch: int
) -> Iterator[tuple[_Task, Microbatch]]:
    """The microbatches of the tasks, in their order, read ahead by `num_workers` processes."""
    loader: DataLoader[tuple[_Task, Microbatch]] = DataLoader(
        reader,
        sampler=tasks,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=begin_worker,
        # Fork shares the tokenizer and the index and imports nothing again. Beside the threads of
        # gloo and CUDA it is safe because workers touch neither; a pin-memory thread would not be.
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # a seed for the workers is drawn; not from the model's
    )
    if num_workers:
        # Texts may have been counted by the threads of the tokenizers library, which says so at
        # each fork unless this is set.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with signals_held():
        batches = iter(loader)
    yield from batches


def _as_it_is(sample: Any) -> Any:
    return sample

"""Which utterances are trained on, and what each costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from speechllm.data.augment import perturbed_samples
from speechllm.data.index import Corpus
from speechllm.data.plan_table import PlanTable, plan_table
from speechllm.data.shared import SHARED_UTTERANCES, shared_arrays
from speechllm.types import SAMPLE_RATE

_VERSION = "1"
_CHUNK = 1 << 20
_LARGEST = np.iinfo(np.int32).max

AudioTokens = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class CostSettings:
    """What costs and choice follow from, besides the corpus.

    prompt_tokens: prefix, suffix and end token together; where shards differ, of each.
    characters_per_token: estimate by which the length of the text is counted where its tokens are
    not. budget: positions of a microbatch; an utterance above it fits none. rate: Hz at which audio
    is taken to be, see `perturbed_samples`.
    """

    prompt_tokens: int | tuple[int, ...]
    characters_per_token: float
    min_seconds: float
    max_seconds: float
    budget: int
    rate: int = SAMPLE_RATE

    def prompt_tokens_in(self, shard: int) -> int:
        tokens = self.prompt_tokens
        return tokens if isinstance(tokens, int) else tokens[shard]


@dataclass(frozen=True, eq=False)
class TextTokens:
    """What was counted. targets: int32 [U], tokens of each target without its end token. prompts:
    int32 [U], tokens of an utterance's own prompt with the end token, 0 where it has none."""

    targets: np.ndarray
    prompts: np.ndarray

    @cached_property
    def digest(self) -> str:
        """sha256 (hex)."""
        return hashlib.sha256(self.targets.tobytes() + self.prompts.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Selection:
    """kept: int64, ascending utterance numbers. dropped: the others by reason, the first that fits
    of too_short, too_long, no_text, over_budget; every reason is there, also with nothing in it."""

    kept: np.ndarray
    dropped: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Population:
    """costs: int32 [U], LLM positions of each utterance. hours: of audio that is kept. table: of
    costs and selection, for planning."""

    costs: np.ndarray
    selection: Selection
    hours: float
    table: PlanTable


def populate(
    corpus: Corpus,
    audio_tokens: AudioTokens,
    settings: CostSettings,
    texts: TextTokens | None = None,
) -> Population:
    """Costs and choice of all utterances of a corpus.

    Those of a large corpus are computed by one process of a node and memory-mapped by the others.

    Args:
        audio_tokens: int64 samples at 16 kHz -> int64 connector outputs, element by element.
        texts: where their tokens were counted.
    """
    if len(corpus) < SHARED_UTTERANCES:
        arrays = _populate(corpus, audio_tokens, settings, texts)
    else:
        arrays = shared_arrays(
            "costs",
            _key(corpus, audio_tokens, settings, texts),
            lambda: _populate(corpus, audio_tokens, settings, texts),
        )
    dropped = {
        name.removeprefix("dropped_"): array
        for name, array in arrays.items()
        if name.startswith("dropped_")
    }
    table = PlanTable(arrays["bounds"], arrays["rows"], arrays["counts"])
    selection = Selection(arrays["kept"], dropped)
    return Population(arrays["costs"], selection, float(arrays["hours"][0]), table)


def costs_at(
    corpus: Corpus,
    audio_tokens: AudioTokens,
    settings: CostSettings,
    rates: np.ndarray | int,
    texts: TextTokens | None = None,
) -> np.ndarray:
    """LLM positions of each utterance whose audio is taken to be at `rates` Hz: int32 [U]."""
    prompt_tokens: np.ndarray | int = 0
    if isinstance(settings.prompt_tokens, int):
        prompt_tokens = settings.prompt_tokens
    else:
        of_shard = np.array(settings.prompt_tokens, dtype=np.int32)
        prompt_tokens = np.repeat(of_shard, corpus.shard_sizes)
    costs = np.empty(len(corpus), dtype=np.int32)
    for at in range(0, len(corpus), _CHUNK):
        chunk = slice(at, at + _CHUNK)
        samples = np.rint(corpus.durations[chunk] * SAMPLE_RATE).astype(np.int64)
        rate = np.broadcast_to(rates, len(corpus))[chunk]
        prompts = np.broadcast_to(prompt_tokens, len(corpus))[chunk]
        if texts is None:
            targets = estimated_tokens(corpus.text_lengths[chunk], settings.characters_per_token)
        else:
            targets, own = texts.targets[chunk], texts.prompts[chunk]
            prompts = np.where(own > 0, own, prompts)
        audio = audio_tokens(perturbed_samples(samples, rate))
        costs[chunk] = utterance_costs(audio, targets, prompts)
    return costs


def estimated_tokens(text_lengths: np.ndarray, characters_per_token: float) -> np.ndarray:
    """Tokens of texts of so many characters: int64 [U]."""
    return np.ceil(np.asarray(text_lengths) / characters_per_token).astype(np.int64)


def utterance_costs(
    audio_tokens: np.ndarray, target_tokens: np.ndarray, prompt_tokens: np.ndarray | int
) -> np.ndarray:
    """LLM positions of each utterance: int32 [U].

    Args:
        audio_tokens: int64 [U], connector outputs.
        target_tokens: int [U], of the target without its end token.
        prompt_tokens: prefix, suffix and end token together.
    """
    costs = np.asarray(audio_tokens).astype(np.int64) + prompt_tokens + target_tokens
    return np.minimum(costs, _LARGEST).astype(np.int32)


def select(
    durations: np.ndarray,
    text_lengths: np.ndarray,
    costs: np.ndarray,
    *,
    min_seconds: float,
    max_seconds: float,
    budget: int,
) -> Selection:
    """Choose the utterances that are trained on.

    Args:
        durations: float64 [U], seconds. text_lengths: int [U], characters.
        costs: int [U], LLM positions.
        budget: positions of a microbatch; an utterance above it fits none.
    """
    rules = {
        "too_short": (durations < min_seconds) | (durations <= 0),
        "too_long": durations > max_seconds,
        "no_text": text_lengths == 0,
        "over_budget": costs > budget,
    }
    left = np.ones(len(durations), dtype=bool)
    dropped = {}
    for reason, hit in rules.items():
        dropped[reason] = np.flatnonzero(left & hit)
        left &= ~hit
    return Selection(kept=np.flatnonzero(left), dropped=dropped)


def _populate(
    corpus: Corpus, audio_tokens: AudioTokens, settings: CostSettings, texts: TextTokens | None
) -> dict[str, np.ndarray]:
    costs = costs_at(corpus, audio_tokens, settings, settings.rate, texts)
    selection = select(
        corpus.durations,
        corpus.text_lengths,
        costs,
        min_seconds=settings.min_seconds,
        max_seconds=settings.max_seconds,
        budget=settings.budget,
    )
    table = plan_table(corpus.shard_sizes, costs, selection.kept, settings.budget)
    return {
        "costs": costs,
        "kept": selection.kept,
        "hours": np.array([corpus.durations[selection.kept].sum() / 3600]),
        "bounds": table.bounds,
        "rows": table.rows,
        "counts": table.counts,
        **{f"dropped_{reason}": numbers for reason, numbers in selection.dropped.items()},
    }


def _key(
    corpus: Corpus, audio_tokens: AudioTokens, settings: CostSettings, texts: TextTokens | None
) -> str:
    """Of the counter of audio tokens, what it says of two thousand lengths up to two minutes."""
    probes = audio_tokens(np.arange(1, 2_000_000, 997))
    counted = None if texts is None else texts.digest
    facts = [_VERSION, corpus.fingerprint, repr(settings), np.asarray(probes).tolist(), counted]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

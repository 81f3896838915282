"""Which microbatches memory is planned for: utterances of several lengths, packed into the budget.

Microbatches hold utterances of like length, so an epoch has some of each length, and the run must
have memory for the costliest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechllm.config.schema import Config
from speechllm.data.augment import perturbed_samples
from speechllm.model.build import audio_token_counter
from speechllm.model.frontend import FRAME_SAMPLES, num_frames
from speechllm.planner.activations import CHUNK_FRAMES, Shape
from speechllm.prepare import Split, TextSide
from speechllm.types import SAMPLE_RATE, Batch

ASSUMED_SECONDS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
ASSUMED_CHARACTERS_PER_SECOND = 15.0  # read English
ASSUMED_PROMPT_TOKENS = 24  # of a chat template with a short instruction
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Utterance:
    """Lengths of one example: 16 kHz samples, tokens of the target, tokens of the prompt with the
    end token."""

    samples: int
    text_tokens: int
    prompt_tokens: int


def assumed(config: Config) -> list[Utterance]:
    """Read speech of 2 s to `data.max_seconds`, 30 s at most, in a short chat prompt."""
    longest = min(config.data.max_seconds, ASSUMED_SECONDS[-1])
    rate = ASSUMED_CHARACTERS_PER_SECOND / config.data.characters_per_token
    return [
        Utterance(round(seconds * SAMPLE_RATE), round(seconds * rate), ASSUMED_PROMPT_TOKENS)
        for seconds in (*(s for s in ASSUMED_SECONDS if s < longest), longest)
    ]


def of_split(config: Config, split: Split, text: TextSide) -> list[Utterance]:
    """The utterances at some quantiles of the split's LLM positions, the longest among them."""
    kept = split.selection.kept
    ordered = kept[np.argsort(split.costs[kept], kind="stable")]
    chosen = np.unique(ordered[[round(q * (len(ordered) - 1)) for q in QUANTILES]])
    settings, corpus = split.cost_settings, split.corpus
    prompts = [settings.prompt_tokens_in(corpus.shard_of(i)) for i in chosen.tolist()]
    samples = np.rint(corpus.durations[chosen] * SAMPLE_RATE).astype(np.int64)
    samples = perturbed_samples(samples, np.full(len(samples), settings.rate))
    tokens = text.audio_tokens(samples)
    return [
        Utterance(int(n), int(cost - k - prompt), prompt)
        for n, k, cost, prompt in zip(samples, tokens, split.costs[chosen], prompts, strict=True)
    ]


def microbatch(config: Config, utterance: Utterance, budget: int) -> Shape | None:
    """As many rows of `utterance` as `budget` positions hold; None where that is not one."""
    tokens = audio_token_counter(config.model)(utterance.samples)
    columns = tokens + utterance.prompt_tokens + utterance.text_tokens
    rows = budget // columns
    if not rows:
        return None
    frames = num_frames(utterance.samples)
    if config.model.encoder.kind == "whisper" and config.model.encoder.context == "pad30":
        frames = -(-frames // CHUNK_FRAMES) * CHUNK_FRAMES
    return Shape(rows, columns, tokens, frames, labels=rows * (utterance.text_tokens + 1))


def shape_of(batch: Batch) -> Shape:
    """The shape of a real microbatch."""
    rows, columns = batch.tokens_BS.shape
    return Shape(
        rows,
        columns,
        tokens=int(batch.audio_mask_BS.sum(1).max()),
        frames=num_frames(batch.audio_AN.shape[1]),
        labels=batch.num_target_tokens,
    )


def audio_bytes(shape: Shape) -> int:
    """The int16 waveforms of a microbatch."""
    return 2 * FRAME_SAMPLES * shape.rows * shape.frames

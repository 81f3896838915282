"""Which microbatches memory is planned for: utterances of several lengths, packed into the budget.

Microbatches hold utterances of like length, so an epoch has some of each length, and the run must
have memory for the costliest of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from speechllm.config.schema import Config
from speechllm.data.augment import perturbed_samples
from speechllm.model.build import audio_token_counter
from speechllm.model.connector import out_length
from speechllm.model.frontend import FRAME_SAMPLES, num_frames
from speechllm.planner.activations import CHUNK_FRAMES, Shape
from speechllm.prepare import Split, TextSide
from speechllm.types import SAMPLE_RATE, Batch

ASSUMED_SECONDS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
ASSUMED_CHARACTERS_PER_SECOND = 15.0  # read English
ASSUMED_PROMPT_TOKENS = 24  # of a chat template with a short instruction
ASSUMED_PREFIX_TOKENS = 16  # of these, before the audio
Count = TypeVar("Count", int, np.ndarray)
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Utterance:
    """Lengths of one example: 16 kHz samples, tokens of the target, tokens of the prompt with the
    end token, of which the first `prefix_tokens` are those of every example."""

    samples: int
    text_tokens: int
    prompt_tokens: int
    prefix_tokens: int = 0


def assumed(config: Config) -> list[Utterance]:
    """Read speech of 2 s to `data.max_seconds`, 30 s at most, in a short chat prompt. A plain
    prompt may have nothing before the audio."""
    longest = min(config.data.max_seconds, ASSUMED_SECONDS[-1])
    rate = ASSUMED_CHARACTERS_PER_SECOND / config.data.characters_per_token
    prefix = ASSUMED_PREFIX_TOKENS if config.model.prompt.kind == "chat" else 0
    return [
        Utterance(
            round(seconds * SAMPLE_RATE), round(seconds * rate), ASSUMED_PROMPT_TOKENS, prefix
        )
        for seconds in (*(s for s in ASSUMED_SECONDS if s < longest), longest)
    ]


def of_split(split: Split, text: TextSide) -> list[Utterance]:
    """The utterances at some quantiles of the split's LLM positions, the longest among them."""
    kept = split.selection.kept
    ordered = kept[np.argsort(split.costs[kept], kind="stable")]
    chosen = np.unique(ordered[[round(q * (len(ordered) - 1)) for q in QUANTILES]])
    settings, corpus = split.cost_settings, split.corpus
    prompts = [settings.prompt_tokens_in(corpus.shard_of(i)) for i in chosen.tolist()]
    samples = _samples(split, chosen)
    counts = (split.costs[chosen] - text.audio_tokens(samples)).tolist()
    return [
        # An utterance's own prompt may be shorter, and is not told from the target here.
        Utterance(n, max(0, count - prompt), min(count, prompt), len(text.prefix))
        for n, count, prompt in zip(samples.tolist(), counts, prompts, strict=True)
    ]


def _samples(split: Split, utterances: np.ndarray) -> np.ndarray:
    """int64 [n]: at the slowest speed that may be drawn."""
    samples = np.rint(split.corpus.durations[utterances] * SAMPLE_RATE).astype(np.int64)
    return perturbed_samples(samples, np.full(len(samples), split.cost_settings.rate))


def microbatch(config: Config, utterance: Utterance, budget: int) -> Shape | None:
    """As many rows of `utterance` as `budget` positions hold; None where that is not one. Under
    `preset: plain` as many as that says, whatever their length, which the budget only bounds."""
    row = row_of(config, utterance)
    rows = budget // (row.tokens + utterance.prompt_tokens + utterance.text_tokens)
    if rows and is_plain(config):
        rows = config.performance.plain_utterances
    return replace(row, rows=rows, labels=rows * row.labels) if rows else None


def row_of(config: Config, utterance: Utterance) -> Shape:
    """The microbatch of that utterance alone."""
    tokens = audio_token_counter(config.model)(utterance.samples)
    text = utterance.prompt_tokens + utterance.text_tokens
    return Shape(
        rows=1,
        columns=int(audio_positions(config, tokens)) + text,
        tokens=tokens,
        frames=_frames(config, utterance.samples),
        labels=utterance.text_tokens + 1,
        prefix=utterance.prefix_tokens,
    )


def shape_of(config: Config, batch: Batch, prefix: int) -> Shape:
    """The shape of a real microbatch. prefix: tokens of the run's with which all its rows begin."""
    audio_B = batch.audio_mask_BS.sum(1).numpy()
    lengths_B = np.array(batch.lengths) - audio_B + audio_positions(config, audio_B)
    return Shape(
        rows=len(lengths_B),
        columns=int(lengths_B.max()),
        tokens=int(audio_B.max()),
        frames=_frames(config, max(batch.audio_samples, default=0)),
        labels=batch.num_target_tokens,
        prefix=prefix,
    )


def planned_positions(
    config: Config, split: Split, text: TextSide, utterances: np.ndarray
) -> np.ndarray:
    """int64 [n]: LLM positions of a row of each of these utterances of a split."""
    tokens = text.audio_tokens(_samples(split, utterances))
    return split.costs[utterances] - tokens + audio_positions(config, tokens)


def audio_positions(config: Config, tokens: Count) -> Count:
    """LLM positions that so many audio tokens take: under `preset: plain` those of 30 s at least
    (see `speechllm.model.plain.with_audio_padding`)."""
    if not is_plain(config):
        return tokens
    return np.maximum(tokens, out_length(config.model.connector, CHUNK_FRAMES))


def is_plain(config: Config) -> bool:
    return config.performance.preset == "plain"


def _frames(config: Config, samples: int) -> int:
    """That the encoder runs on; it need not be settled yet that plain means `pad30`."""
    frames, encoder = num_frames(samples), config.model.encoder
    if encoder.kind == "whisper" and (encoder.context == "pad30" or is_plain(config)):
        frames = -(-frames // CHUNK_FRAMES) * CHUNK_FRAMES
    return frames


def audio_bytes(shape: Shape) -> int:
    """The int16 waveforms of a microbatch."""
    return 2 * FRAME_SAMPLES * shape.rows * shape.frames

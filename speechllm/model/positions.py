"""How many positions a microbatch is run on, and how many of them are padding, known before it is.

Shape legend: B examples.
"""

from __future__ import annotations

from typing import NamedTuple

from speechllm.model.prefix import masks_hold
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import Batch, Objective


class Positions(NamedTuple):
    """run: by all rows of a microbatch. used: of these, not padding."""

    run: int
    used: int


def positions_of(model: SpeechLLM, batch: Batch, objective: Objective = "lm") -> Positions:
    """Of the LLM: without the prefix whose keys and values are at hand, without padding where rows
    are packed, with all that `preset: plain` runs. Of `ctc`, which does not run the LLM, the audio
    tokens. The batch is one on the host."""
    if objective == "ctc":
        rows = len(batch.audio_samples)
        return Positions(rows * batch.most_audio_tokens, len(batch.audio_places_K))
    shortcuts, rows, used = model.shortcuts, len(batch.lengths), sum(batch.lengths)
    if shortcuts.plain:
        return Positions(rows * plain_columns(batch, model.tokens_of_chunk), used)
    if not masks_hold(max(batch.lengths), shortcuts.longest_row):
        return Positions(rows * max(batch.lengths), used)
    left_out = shortcuts.prefix.length(batch.opening)
    used -= rows * left_out
    return Positions(used if shortcuts.packing else rows * (max(batch.lengths) - left_out), used)


def plain_columns(batch: Batch, tokens_of_chunk: int) -> int:
    """Columns of `speechllm.model.plain.with_audio_padding`."""
    if len(batch.audio_samples) != len(batch.lengths):
        return max(batch.lengths)
    audio_B = batch.audio_mask_BS.sum(1).tolist()
    return max(
        length + (max(0, tokens_of_chunk - audio) if audio else 0)
        for length, audio in zip(batch.lengths, audio_B, strict=True)
    )

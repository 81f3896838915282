"""Examples to one padded batch.

Shape legend: B examples, S positions of the LLM, A audio segments, N samples at 16 kHz, G masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from speechllm.types import IGNORE, AudioSegment, Batch, Example, SpecMasks


def collate(
    examples: Sequence[Example],
    audio_tokens: Callable[[int], int],
    *,
    pad_id: int,
    pad_left: bool = False,
) -> Batch:
    """Pad examples, whatever segments they are made of, to one batch.

    Labels follow from the segments and never from token ids, so a padding token that is also the
    end token stays in the loss where it ends a target, and out of it where it pads.

    Args:
        examples: at least one.
        audio_tokens: LLM positions that a number of samples takes.
        pad_id: any valid token id; fills padding and the places of audio.
        pad_left: padding goes before the examples, as generation needs it.
    """
    segments = [s for e in examples for s in e.segments if isinstance(s, AudioSegment)]
    audio = [segment.samples for segment in segments]
    lengths = [len(samples) for samples in audio]
    audio_AN = torch.zeros(len(audio), max(lengths, default=0), dtype=torch.int16)
    for row_N, samples in zip(audio_AN, audio, strict=True):
        row_N[: len(samples)] = torch.from_numpy(samples)

    rows = [_row(example, audio_tokens, pad_id) for example in examples]
    shape = (len(rows), max(len(tokens) for tokens, _, _ in rows))
    tokens_BS = torch.full(shape, pad_id, dtype=torch.int64)
    audio_mask_BS = torch.zeros(shape, dtype=torch.bool)
    attention_mask_BS = torch.zeros(shape, dtype=torch.int64)
    labels_BS = torch.full(shape, IGNORE, dtype=torch.int64)
    for b, (tokens, is_audio, labels) in enumerate(rows):
        start = shape[1] - len(tokens) if pad_left else 0
        place = slice(start, start + len(tokens))
        tokens_BS[b, place] = torch.tensor(tokens)
        audio_mask_BS[b, place] = torch.tensor(is_audio)
        attention_mask_BS[b, place] = 1
        labels_BS[b, place] = torch.tensor(labels)
    return Batch(
        keys=[example.key for example in examples],
        audio_AN=audio_AN,
        audio_lengths_A=torch.tensor(lengths, dtype=torch.int64),
        tokens_BS=tokens_BS,
        audio_mask_BS=audio_mask_BS,
        attention_mask_BS=attention_mask_BS,
        labels_BS=labels_BS,
        masks=_stacked([segment.masks for segment in segments]),
    )


def _stacked(masks: Sequence[SpecMasks | None]) -> SpecMasks | None:
    """The masks of all segments, those that have fewer filled up with empty ones."""
    given = [m for m in masks if m is not None]
    if not given:
        return None
    stacks = []
    for field in range(len(SpecMasks._fields)):
        count = max(len(m[field]) for m in given)
        stack_AG2 = np.zeros((len(masks), count, 2), given[0][field].dtype)
        for row_G2, m in zip(stack_AG2, masks, strict=True):
            if m is not None:
                row_G2[: len(m[field])] = m[field]
        stacks.append(torch.from_numpy(stack_AG2))
    return SpecMasks(*stacks)


def _row(
    example: Example, audio_tokens: Callable[[int], int], pad_id: int
) -> tuple[list[int], list[bool], list[int]]:
    """Token, whether it is audio, and label of each position of one example."""
    tokens: list[int] = []
    is_audio: list[bool] = []
    labels: list[int] = []
    for segment in example.segments:
        if isinstance(segment, AudioSegment):
            count = int(audio_tokens(len(segment.samples)))
            tokens += [pad_id] * count
            labels += [IGNORE] * count
        else:
            count = len(segment.tokens)
            tokens += segment.tokens
            labels += segment.tokens if segment.trained else [IGNORE] * count
        is_audio += [isinstance(segment, AudioSegment)] * count
    return tokens, is_audio, labels

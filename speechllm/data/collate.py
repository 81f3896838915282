"""Examples to one padded batch.

Shape legend: B examples, S positions of the LLM, A audio segments, N samples at 16 kHz, G masks,
T encoder frames of width D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from speechllm.data.prefix import common_prefix, opening
from speechllm.data.sending import BatchMemory
from speechllm.types import (
    IGNORE,
    AudioSegment,
    Batch,
    EncodedAudio,
    Example,
    Frames,
    Segment,
    SpecMasks,
)


def collate(
    examples: Sequence[Example],
    audio_tokens: Callable[[int], int],
    *,
    pad_id: int,
    pad_left: bool = False,
    memory: BatchMemory | None = None,
) -> Batch:
    """Pad examples, whatever segments they are made of, to one batch.

    Labels follow from the segments and never from token ids, so a padding token that is also the
    end token stays in the loss where it ends a target, and out of it where it pads.

    Args:
        examples: at least one.
        audio_tokens: LLM positions that a number of samples takes.
        pad_id: any valid token id; fills padding and the places of audio.
        pad_left: padding goes before the examples, as generation needs it.
        memory: where audio and frames go.
    """
    memory = BatchMemory() if memory is None else memory
    segments = [s for e in examples for s in e.segments if isinstance(s, AudioSegment)]
    lengths = [segment.num_samples for segment in segments]
    frames = _padded_frames([segment.encoded for segment in segments], memory)
    audio_shape = (len(segments), 0 if frames else max(lengths, default=0))
    audio_AN = memory.empty(audio_shape, torch.int16)
    for row_N, segment in zip(audio_AN.numpy(), segments, strict=True):
        row_N[: len(segment.samples)] = segment.samples
        row_N[len(segment.samples) :] = 0

    counts = [[_positions(s, audio_tokens) for s in example.segments] for example in examples]
    shape = (len(examples), max(sum(of_row) for of_row in counts))
    tokens_BS = np.full(shape, pad_id, dtype=np.int64)
    audio_mask_BS = np.zeros(shape, dtype=bool)
    attention_mask_BS = np.zeros(shape, dtype=np.int64)
    labels_BS = np.full(shape, IGNORE, dtype=np.int64)
    for b, example in enumerate(examples):
        end = shape[1] - sum(counts[b]) if pad_left else 0
        attention_mask_BS[b, end : end + sum(counts[b])] = 1
        for part, count in zip(example.segments, counts[b], strict=True):
            place = slice(end, end + count)
            end += count
            if isinstance(part, AudioSegment):
                audio_mask_BS[b, place] = True
                continue
            tokens_BS[b, place] = part.tokens
            if part.trained:
                labels_BS[b, place] = part.tokens
    audio_counts = [int(audio_tokens(samples)) for samples in lengths]
    # Nothing predicts the first token of a row.
    predicted_BS = (labels_BS[:, 1:] != IGNORE) & (attention_mask_BS[:, :-1] > 0)
    label_places_L = np.flatnonzero(predicted_BS)
    label_places_L += label_places_L // max(shape[1] - 1, 1)  # rows are S long, not S - 1
    return Batch(
        keys=[example.key for example in examples],
        audio_AN=audio_AN,
        audio_lengths_A=torch.tensor(lengths, dtype=torch.int64),
        tokens_BS=torch.from_numpy(tokens_BS),
        audio_mask_BS=torch.from_numpy(audio_mask_BS),
        attention_mask_BS=torch.from_numpy(attention_mask_BS),
        labels_BS=torch.from_numpy(labels_BS),
        audio_places_K=torch.from_numpy(np.flatnonzero(audio_mask_BS)),
        audio_sources_K=torch.from_numpy(_sources(audio_counts)),
        label_places_L=torch.from_numpy(label_places_L),
        targets_L=torch.from_numpy(labels_BS.ravel()[label_places_L + 1]),
        lengths=tuple(sum(of_row) for of_row in counts),
        audio_samples=tuple(lengths),
        most_audio_tokens=max(audio_counts, default=0),
        opening=common_prefix(map(opening, examples)),
        pad_left=pad_left,
        masks=_stacked([segment.masks for segment in segments]),
        frames=frames,
    )


def _padded_frames(encoded: Sequence[EncodedAudio | None], memory: BatchMemory) -> Frames | None:
    """None where samples are there instead, which goes for all segments of a batch or for none."""
    given = [one for one in encoded if one is not None]
    assert len(given) in (0, len(encoded)), "audio of a batch is encoded as a whole or not at all"
    if not given:
        return None
    scales = [one.scales_D for one in given if one.scales_D is not None]
    shape = (len(given), max(len(one.values_TD) for one in given), given[0].values_TD.shape[1])
    values_ATD = memory.empty(shape, torch.int8 if scales else torch.bfloat16)
    bits_ATD = values_ATD.numpy() if scales else values_ATD.view(torch.int16).numpy()
    for row_TD, one in zip(bits_ATD, given, strict=True):
        row_TD[: len(one.values_TD)] = one.values_TD
        row_TD[len(one.values_TD) :] = 0
    return Frames(values_ATD, torch.from_numpy(np.stack(scales)) if scales else None)


def _positions(segment: Segment, audio_tokens: Callable[[int], int]) -> int:
    if isinstance(segment, AudioSegment):
        return int(audio_tokens(segment.num_samples))
    return len(segment.tokens)


def _sources(counts: Sequence[int]) -> np.ndarray:
    """int64 [K]: where the tokens of all segments are in [A, most tokens of any], flattened."""
    return np.flatnonzero(np.arange(max(counts, default=0)) < np.array(counts, ndmin=2).T)


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

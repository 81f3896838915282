"""Token ids that the model says for a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transformers import GenerationConfig

from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import Batch


@torch.no_grad()
def generate(
    model: SpeechLLM,
    batch: Batch,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 0.0,
    end_token_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Greedy (one beam) or beam search decoding, without dropout; nothing is sampled.

    Args:
        batch: prompts without targets, padded on the left.
        max_new_tokens: the end token included.
        length_penalty: power of the length by which the score of a beam is divided.
        end_token_ids: any of them ends a row.

    Returns:
        For each row the ids before its end token, or `max_new_tokens` of them without one.
    """
    assert bool(batch.attention_mask_BS[:, -1].all()), "prompts must be padded on the left"
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty if num_beams > 1 else 1.0,  # else transformers warns
        do_sample=False,
        eos_token_id=list(end_token_ids),
        pad_token_id=pad_id,
    )
    was_training = model.training
    model.eval()
    try:
        rows = model.generate(batch, settings)
    finally:
        model.train(was_training)
    return [_until_end(row, end_token_ids) for row in rows.tolist()]


def _until_end(row: list[int], end_token_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(row):
        if token in end_token_ids:
            return row[:place]
    return row

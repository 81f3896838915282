"""Token ids that the model says for a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from speechllm.model.decoding import Decoding
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
    plain: bool = False,
) -> list[list[int]]:
    """Greedy (one beam) or beam search decoding, without dropout; nothing is sampled.

    Args:
        batch: prompts without targets, padded on the left.
        max_new_tokens: the end token included.
        length_penalty: power of the length by which the score of a beam is divided.
        end_token_ids: any of them ends a row.
        plain: by transformers' own `generate`, which says the same more slowly.

    Returns:
        For each row the ids before its end token, or `max_new_tokens` of them without one.
    """
    assert bool(batch.attention_mask_BS[:, -1].all()), "prompts must be padded on the left"
    settings = Decoding(
        max_new_tokens, num_beams, length_penalty, tuple(end_token_ids), pad_id, plain
    )
    any_rank = partial(_any_rank, model.device) if model.sharded else None
    was_training = model.training
    model.eval()
    try:
        return model.generate(batch, settings, any_rank)
    finally:
        model.train(was_training)


def _any_rank(device: torch.device, goes_on: bool) -> bool:
    going = torch.tensor(int(goes_on), device=device)
    dist.all_reduce(going)
    return bool(going)

"""The LLM's loss as straightforward code has it: what the shortcuts must equal.

Shape legend: B examples, S positions, W width of the embeddings, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from transformers import PreTrainedModel

from speechllm.model.layout import position_ids
from speechllm.types import IGNORE, Batch, LossSums


def plain_loss(llm: PreTrainedModel, embeds_BSW: Tensor, batch: Batch) -> LossSums:
    """Logits of every position of every row, and their cross entropy with the token that follows
    where that is trained."""
    logits_BSV = llm(
        inputs_embeds=embeds_BSW,
        attention_mask=batch.attention_mask_BS,
        position_ids=position_ids(batch.attention_mask_BS),
        use_cache=False,
    ).logits
    logits_BSV = logits_BSV[:, :-1].float()
    nothing_before_BS = batch.attention_mask_BS[:, :-1] == 0
    labels_BS = batch.labels_BS[:, 1:].masked_fill(nothing_before_BS, IGNORE)
    loss = functional.cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    with torch.no_grad():
        trained_BS = labels_BS != IGNORE
        correct = ((logits_BSV.argmax(-1) == labels_BS) & trained_BS).sum()
    return LossSums(loss, correct, trained_BS.sum())

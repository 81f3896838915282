"""The LLM's loss as straightforward code has it: what the shortcuts must equal.

Shape legend: B examples, S positions, X of them with the padding of audio, W width of the
embeddings, V vocabulary, L trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from transformers import PreTrainedModel

from speechllm.model.layout import position_ids
from speechllm.types import IGNORE, Batch, LossSums


def plain_loss(
    llm: PreTrainedModel, embeds_BSW: Tensor, batch: Batch, tokens_of_chunk: int
) -> LossSums:
    """Logits of every position of every row, and their cross entropy with the token that follows
    where that is trained. tokens_of_chunk: see `with_audio_padding`."""
    embeds_BXW, mask_BX, columns_BS = with_audio_padding(embeds_BSW, batch, tokens_of_chunk)
    logits_BXV = llm(
        inputs_embeds=embeds_BXW,
        attention_mask=mask_BX,
        position_ids=position_ids(mask_BX),
        use_cache=False,
    ).logits.float()
    rows_L = batch.label_places_L // columns_BS.shape[1]
    labels_BX = torch.full_like(mask_BX, IGNORE)
    labels_BX[rows_L, columns_BS.flatten()[batch.label_places_L]] = batch.targets_L
    loss = functional.cross_entropy(
        logits_BXV.flatten(0, 1), labels_BX.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    with torch.no_grad():
        trained_BX = labels_BX != IGNORE
        correct = ((logits_BXV.argmax(-1) == labels_BX) & trained_BX).sum()
    return LossSums(loss, correct, trained_BX.sum())


def with_audio_padding(
    embeds_BSW: Tensor, batch: Batch, tokens_of_chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which the audio takes as many positions as 30 s of it (`tokens_of_chunk`), as where
    features are padded before the connector. Nothing sees these positions, so they change nothing
    but the cost; rows of other than one audio, or a longer one, stay as they are.

    Returns:
        embeddings [B, X, W], attention mask [B, X], and in which column [B, S] of them each
        position is.
    """
    there_BS = batch.attention_mask_BS > 0
    nth_BS = position_ids(batch.attention_mask_BS)
    audio_B = batch.audio_mask_BS.sum(1)
    extra_B = torch.zeros_like(audio_B)
    if len(batch.audio_samples) == len(batch.lengths):
        extra_B = (tokens_of_chunk - audio_B).clamp(min=0) * (audio_B > 0)
    behind_BS = batch.audio_mask_BS.flip(1).cumsum(1).flip(1) == 0
    lengths_B = there_BS.sum(1) + extra_B
    columns = int(lengths_B.max())
    start_B = columns - lengths_B if batch.pad_left else torch.zeros_like(lengths_B)
    columns_BS = start_B[:, None] + nth_BS + behind_BS * extra_B[:, None]

    rows, places = there_BS.nonzero(as_tuple=True)
    shape = (len(embeds_BSW), columns)
    embeds_BXW = embeds_BSW.new_zeros(*shape, embeds_BSW.shape[2])
    embeds_BXW = embeds_BXW.index_put((rows, columns_BS[rows, places]), embeds_BSW[rows, places])
    mask_BX = batch.attention_mask_BS.new_zeros(shape)
    mask_BX[rows, columns_BS[rows, places]] = 1
    return embeds_BXW, mask_BX, columns_BS

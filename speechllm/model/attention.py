"""Attention of grouped queries (Ainslie et al. 2023, arXiv:2305.13245) as matrix products of whole
groups: `model.llm.attention: grouped`.

For CPUs at the lengths of speech. Transformers' eager attention copies keys and values for every
head of a group and keeps four matrices of scores; the backward of torch's fused kernel is slower
than what it fuses. Here the heads of a group are rows of one product with the keys they share, and
one matrix of scores is kept. One layer's attention of SmolLM2-135M (nine heads, three of keys),
forward and backward in fp32, CPU time of one core with AVX2: 9 x 85 positions behind a prefix of 28
in 14 ms (eager 19, sdpa 18), 4 x 256 in 49 ms (eager 56, sdpa 49). That is a tenth of a layer.

Shape legend: B rows, H heads, G groups (key heads), Q = H / G x S queries of a group, S positions,
N keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from speechllm.errors import ModelError

GROUPED = "grouped"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what other attention functions take besides


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHSE: Tensor,
        key_BGNE: Tensor,
        value_BGNE: Tensor,
        mask_B1SN: Tensor | None,
        scaling: float,
    ) -> Tensor:
        rows, groups, keys, width = key_BGNE.shape
        positions = query_BHSE.shape[2]
        with torch.autocast(query_BHSE.device.type, enabled=False):  # which softmax would widen
            query = query_BHSE.reshape(rows * groups, -1, width)
            key = key_BGNE.reshape(rows * groups, keys, width)
            value = value_BGNE.reshape(rows * groups, keys, width)
            scores = torch.bmm(query, key.transpose(1, 2))
            if mask_B1SN is None:
                scores.mul_(scaling)
            else:
                scores_BGHSN = scores.view(rows, groups, -1, positions, keys)
                torch.add(mask_B1SN[:, :, None], scores_BGHSN, alpha=scaling, out=scores_BGHSN)
            shares = scores.softmax(2)
            mixed = torch.bmm(shares, value)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scaling, ctx.shapes = scaling, (query_BHSE.shape, key_BGNE.shape)
        return mixed.view(query_BHSE.shape).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, shares = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        grad = grad_BSHE.transpose(1, 2).reshape(query.shape)
        grad_value = torch.bmm(shares.transpose(1, 2), grad)
        grad_shares = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_shares, shares, 2, shares.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query).mul_(ctx.scaling)
        return (
            grad_query.view(query_shape), grad_key.view(key_shape), grad_value.view(key_shape),
            None, None,
        )  # fmt: skip


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention functions: query [B, H, S, E], key and value [B, G, N, E],
    an additive mask [B or 1, 1, S, N] or None for all -> [B, S, H, E].

    Raises ModelError for kinds of attention that it does not know.
    """
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown or dropout or (attention_mask is not None and attention_mask.shape[1] != 1):
        raise ModelError(
            f"model.llm.attention=grouped: {type(module).__name__} wants "
            f"{', '.join(unknown) or 'dropout or a mask by heads'}; set it to eager"
        )
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]].to(query.dtype)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    value = value.to(query.dtype)
    mixed: Tensor = _Attend.apply(query, key.to(query.dtype), value, attention_mask, scaling)
    return mixed, None


def register() -> None:
    """Make `attn_implementation="grouped"` known to transformers; again does nothing more."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, eager_mask)

"""How the examples of a batch lie in the rows that the LLM runs on: padded, or packed into one.

Shape legend: B examples, S positions of the batch, P tokens of the prefix that is left out, R rows
and C columns of the layout (R = B and C = S - P where it is padded, R = 1 where it is packed),
K audio tokens, L target tokens, N keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speechllm.types import Batch

MaskKind = Literal["bool", "additive", "rows", "varlen"]
MASK_KINDS: dict[str, MaskKind] = {
    "sdpa": "bool",
    "eager": "additive",
    "grouped": "additive",
    "flash_attention_2": "varlen",
}


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else the lowest number of that type."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Layout:
    """Everything that the LLM wants but the embeddings. Places are indices into [R * C].

    attention_mask: over prefix and columns. [R, P + C], 1 where there is something; or
    [R, 1, C, P + C], True where a query sees a key; or None.
    order_N: see `Prefix.cache`. options: what else the LLM's forward wants.
    """

    tokens_RC: Tensor
    position_ids_RC: Tensor
    audio_places_K: Tensor
    label_places_L: Tensor
    attention_mask: Tensor | None
    order_N: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def position_ids(attention_mask_BS: Tensor) -> Tensor:
    """0, 1, ... from each row's first real position, wherever the padding is."""
    return (attention_mask_BS.cumsum(1) - 1).clamp(min=0)


def padded(batch: Batch, prefix: int, kind: MaskKind) -> Layout:
    """One example a row, `prefix` columns fewer. They held the prefix or, in a row that is padded
    on the left, some of its padding; what is left of the prefix then counts as padding."""
    columns = batch.tokens_BS.shape[1]
    ids_BS = position_ids(batch.attention_mask_BS)
    ids_RC = ids_BS[:, prefix:]
    there_RC = (batch.attention_mask_BS[:, prefix:] > 0) & (ids_RC >= prefix)
    seen_RN = torch.cat((there_RC.new_ones(len(there_RC), prefix), there_RC), dim=1)
    mask: Tensor = seen_RN.long()
    if kind in ("bool", "additive"):
        causal_CN = torch.ones(
            columns - prefix, columns, dtype=torch.bool, device=mask.device
        ).tril_(prefix)
        # Padding sees itself, so that no query is without a key.
        own_CN = torch.ones_like(causal_CN).tril_(prefix).triu_(prefix)
        mask = ((seen_RN[:, None] & causal_CN) | own_CN)[:, None]
    return Layout(
        tokens_RC=batch.tokens_BS[:, prefix:],
        position_ids_RC=ids_RC,
        audio_places_K=_without_columns(batch.audio_places_K, columns, prefix),
        label_places_L=_without_columns(batch.label_places_L, columns, prefix),
        attention_mask=mask,
    )


def packed(batch: Batch, prefix: int, kind: MaskKind) -> Layout:
    """All examples in one row without padding; each sees the prefix and itself, and its positions
    go on from the prefix."""
    assert kind in ("bool", "additive", "varlen")
    rows, columns = batch.tokens_BS.shape
    device = batch.tokens_BS.device
    counts_B = np.array(batch.lengths) - prefix
    total = int(counts_B.sum())
    example_C = np.repeat(np.arange(rows), counts_B)
    starts_B = np.cumsum(counts_B) - counts_B
    ids_C = np.arange(total) - starts_B[example_C] + prefix
    left_B = columns - np.array(batch.lengths) if batch.pad_left else np.zeros(rows, dtype=np.int64)
    sources_C = example_C * columns + left_B[example_C] + ids_C

    sources = torch.from_numpy(sources_C).to(device, non_blocking=True)
    places = torch.zeros(rows * columns, dtype=torch.int64, device=device)
    places[sources] = torch.arange(total, device=device)
    layout: dict[str, Any] = {
        "tokens_RC": batch.tokens_BS.flatten()[sources][None],
        "position_ids_RC": torch.from_numpy(ids_C).to(device, non_blocking=True)[None],
        "audio_places_K": places[batch.audio_places_K],
        "label_places_L": places[batch.label_places_L],
    }
    if kind == "varlen":
        return Layout(
            **layout,
            attention_mask=None,
            order_N=_keys_by_example(counts_B, starts_B, prefix, device) if prefix else None,
            options=_sequence_bounds(counts_B, prefix, device),
        )
    example = torch.from_numpy(example_C).to(device, non_blocking=True)
    causal_CC = torch.ones(total, total, dtype=torch.bool, device=device).tril_()
    same_CC = (example[:, None] == example) & causal_CC
    seen_CN = torch.cat((same_CC.new_ones(total, prefix), same_CC), dim=1)[None, None]
    return Layout(**layout, attention_mask=seen_CN)


def _sequence_bounds(counts_B: np.ndarray, prefix: int, device: torch.device) -> dict[str, Any]:
    """By the names of transformers' flash attention; each example's keys include the prefix."""
    bounds: dict[str, Any] = {}
    for letter, lengths_B in (("q", counts_B), ("k", counts_B + prefix)):
        ends = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths_B))).astype(np.int32))
        bounds[f"cu_seq_lens_{letter}"] = ends.to(device, non_blocking=True)
        bounds[f"max_length_{letter}"] = int(lengths_B.max())
    return bounds


def _keys_by_example(
    counts_B: np.ndarray, starts_B: np.ndarray, prefix: int, device: torch.device
) -> Tensor:
    """Of the keys of prefix and row, for each example the prefix's and then its own."""
    first = np.arange(prefix)
    parts = [
        part
        for start, count in zip(starts_B, counts_B, strict=True)
        for part in (first, np.arange(prefix + start, prefix + start + count))
    ]
    return torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)


def _without_columns(places: Tensor, columns: int, dropped: int) -> Tensor:
    return places - (places // columns + 1) * dropped if dropped else places

"""Keys and values while decoding: of a prompt once, whatever the number of beams.

The beams of an utterance are query positions of one row. What a beam has said lies in columns that
never move; which columns a beam descends from is a mask. So to choose other beams costs a few
bytes of mask, where a cache with a row for each beam copies all its keys and values.

Shape legend: B utterances, Q beams, H heads of queries, G heads of queries that share keys and
values, D width of a head, C columns, N columns after the prompt, P columns of the shared prefix,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

KeysValues = tuple[Tensor, Tensor]  # of one layer, [1, H / G, P, D] each
STEPS_AHEAD = 24  # for which a block has room when it is made
STEPS_FREED = 8  # for which there is room at least after columns have been dropped


class Columns(DynamicLayer):
    """Keys and values of one layer, in blocks with room at their end."""

    keys: Tensor  # [B, H / G, columns and room, D]
    values: Tensor

    def __init__(self, prefix: KeysValues | None, room: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.room = room
        self.used = 0 if prefix is None else prefix[0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, H / G, new columns, D] each; gives all that is stored, as views."""
        end = self.used + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif end > self.keys.shape[2]:
            self.reserve(end - self.used + self.room)
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = self.used + key_states.shape[2] + self.room
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        if self.prefix is not None:
            # Copied once a batch, not once a step: what lies in one tensor suits any attention.
            self.keys[:, :, : self.used] = self.prefix[0]
            self.values[:, :, : self.used] = self.prefix[1]
            self.prefix = None
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def reserve(self, columns: int) -> None:
        """Make room for as many more columns."""
        lacking = self.used + columns - self.keys.shape[2]
        if lacking > 0:
            self.keys = functional.pad(self.keys, (0, 0, 0, lacking))
            self.values = functional.pad(self.values, (0, 0, 0, lacking))

    def keep_rows(self, rows: Tensor) -> None:
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)

    def keep_columns(self, first: int, columns_BN: Tensor) -> None:
        """Of the columns from `first` on, those that each row names."""
        end = first + columns_BN.shape[1]
        for block in (self.keys, self.values):
            where = columns_BN[:, None, :, None].expand(-1, block.shape[1], -1, block.shape[3])
            block[:, :, first:end] = block[:, :, first : self.used].gather(2, where)
        self.used = end


class Beams:
    """What the rows of a batch have read and their beams have said, so far one beam a row."""

    def __init__(
        self,
        llm: PreTrainedModel,
        num_beams: int,
        prefix: Sequence[KeysValues] = (),
    ) -> None:
        self.llm = llm
        layers = range(len(_layers_of(llm)))
        room = STEPS_AHEAD * num_beams
        self.layers = [Columns(prefix[i] if prefix else None, room) for i in layers]
        self.cache = Cache(layers=list(self.layers))

    def read(self, embeds_BSW: Tensor, real_BC: Tensor, positions_BS: Tensor) -> Tensor:
        """Prompts; logits [B, 1, V] of what follows each.

        real_BC: bool, which columns, with those of the shared prefix, are not padding.
        """
        logits_B1V: Tensor = self.llm(
            inputs_embeds=embeds_BSW,
            attention_mask=real_BC.to(torch.int64),
            position_ids=positions_BS,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.prompt = real_BC.shape[1]
        self.next_B = real_BC.sum(1)
        self.seen_BQC = real_BC[:, None]
        return logits_B1V

    def say(self, tokens_BQ: Tensor, parents_BQ: Tensor) -> Tensor:
        """One more token for each beam; logits [B, Q, V] of what follows.

        parents_BQ: the beam of the same row which each goes on from.
        """
        rows, beams = tokens_BQ.shape
        columns = self.seen_BQC.shape[2]
        self.seen_BQC = self.seen_BQC.gather(1, parents_BQ[:, :, None].expand(-1, -1, columns))
        if beams > 1 and self.layers[0].used + beams > self.layers[0].keys.shape[2]:
            self._drop_what_no_beam_sees()
        itself_BQQ = torch.eye(beams, dtype=torch.bool, device=tokens_BQ.device).expand(
            rows, -1, -1
        )
        self.seen_BQC = torch.cat((self.seen_BQC, itself_BQQ), dim=2)
        nothing = torch.zeros((), dtype=self.llm.dtype, device=tokens_BQ.device)
        bias_BQC = nothing.new_full((), torch.finfo(nothing.dtype).min).where(
            ~self.seen_BQC, nothing
        )
        logits_BQV: Tensor = self.llm(
            input_ids=tokens_BQ,
            attention_mask=bias_BQC[:, None],
            position_ids=self.next_B[:, None].expand(-1, beams),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.next_B = self.next_B + 1
        return logits_BQV

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows."""
        self.seen_BQC = self.seen_BQC.index_select(0, rows)
        self.next_B = self.next_B.index_select(0, rows)
        for layer in self.layers:
            layer.keep_rows(rows)

    def _drop_what_no_beam_sees(self) -> None:
        """Beams soon have the same forebears, so nearly all columns older than a few steps are of
        beams that have been given up."""
        said_BQN = self.seen_BQC[:, :, self.prompt :]
        seen_BN = said_BQN.any(1)
        most = int(seen_BN.sum(1).max())
        seen_first_BN = seen_BN.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        for layer in self.layers:
            layer.keep_columns(self.prompt, seen_first_BN)
            layer.reserve(STEPS_FREED * said_BQN.shape[1])
        where = seen_first_BN[:, None].expand(-1, said_BQN.shape[1], -1)
        self.seen_BQC = torch.cat(
            (self.seen_BQC[:, :, : self.prompt], said_BQN.gather(2, where)), dim=2
        )


def can_hold(llm: PreTrainedModel) -> bool:
    """Whether every layer of the LLM attends to all that came before, by an attention function
    that can be chosen: no sliding windows, states, shared layers, soft caps or position biases."""
    return (
        bool(llm._supports_attention_backend)
        and all(type(layer) is DynamicLayer for layer in _layers_of(llm))
        and getattr(llm.config, "attn_logit_softcapping", None) is None
    )


def _layers_of(llm: PreTrainedModel) -> Sequence[Any]:
    return DynamicCache(config=llm.config.get_text_config(decoder=True)).layers


def shared_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, H, Q, D] to [B, H / G, C, D] with a bias [B, 1, Q, C]; gives [B, Q, H, D].

    The G heads and the Q beams that share keys and values are rows of one matrix product. Eager
    and sdpa copy keys and values G times where there is more than one query.
    """
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    assert not unknown, f"{type(module).__name__} wants {unknown} of its attention"
    rows, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)
        if queries > 1:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * queries, width),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return out.reshape(rows, heads, queries, value.shape[3]).transpose(1, 2), None


ATTENTION = "speechllm_shared_heads"
AttentionInterface.register(ATTENTION, shared_heads)


@contextmanager
def attention_of_beams(llm: PreTrainedModel) -> Iterator[None]:
    """What `Beams.say` needs; prompts are read with the model's own attention."""
    before = llm.config._attn_implementation
    assert before is not None
    llm.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        llm.set_attn_implementation(before)

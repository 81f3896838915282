"""Which of the shortcuts of the section `performance` hold for an LLM, and the LLM's loss by them.

Shape legend: R rows and C columns of the layout, W width of the LLM, L target tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from speechllm.config.performance import Performance
from speechllm.errors import ConfigError
from speechllm.log import logger
from speechllm.model.head import chunked_loss, liger_loss, plain_head, refuse_liger
from speechllm.model.layout import MASK_KINDS, Layout, MaskKind, additive, packed, padded
from speechllm.model.loss import label_loss
from speechllm.model.prefix import Prefix, longest_row, masks_hold, why_not_cached
from speechllm.types import Batch, LossSums


@dataclass(frozen=True)
class Shortcuts:
    """What `choose` has found.

    plain: none of them. head: the output matrix, where the loss may use it without the LLM's own
    forward. longest_row: positions up to which masks of our own say the same as the LLM's.
    """

    plain: bool
    prefix: Prefix
    packing: bool
    mask_kind: MaskKind
    longest_row: int | None
    label_logits: bool
    logits_megabytes: int
    liger: bool
    head: nn.Linear | None

    def lay_out(self, batch: Batch) -> tuple[Layout, Cache | None]:
        """The rows and, where they leave out a prefix, its keys and values, which must have been
        computed."""
        if not masks_hold(max(batch.lengths), self.longest_row):
            return padded(batch, 0, "rows"), None
        length = self.prefix.length(batch.opening)
        lay_out = packed if self.packing else padded
        layout = lay_out(batch, length, self.mask_kind)
        return layout, self.prefix.cache(length, layout.order_N) if length else None

    def loss(
        self,
        llm: PreTrainedModel,
        embeds_RCW: Tensor,
        layout: Layout,
        cache: Cache | None,
        targets_L: Tensor,
    ) -> LossSums:
        """Of the targets, each predicted at its place of the layout."""
        mask = layout.attention_mask
        if mask is not None and mask.ndim == 4 and self.mask_kind == "additive":
            mask = additive(mask, embeds_RCW.dtype)
        inputs = {
            "inputs_embeds": embeds_RCW,
            "attention_mask": mask,
            "position_ids": layout.position_ids_RC,
            "past_key_values": cache,
            "use_cache": False,
            **layout.options,
        }
        places_L = layout.label_places_L
        if self.label_logits and self.head is not None:
            hidden_RCW = llm.base_model(**inputs).last_hidden_state
            hidden_LW = hidden_RCW.flatten(0, 1).index_select(0, places_L)
            if self.liger:
                return liger_loss(hidden_LW, self.head, targets_L)
            return chunked_loss(hidden_LW, self.head, targets_L, megabytes=self.logits_megabytes)
        if self.label_logits:
            keep_RC = torch.zeros_like(layout.tokens_RC, dtype=torch.bool)
            keep_RC.view(-1).index_fill_(0, places_L, True)
            return label_loss(llm(**inputs, logits_to_keep=keep_RC).logits, targets_L)
        logits_RCV = llm(**inputs).logits
        return label_loss(logits_RCV.flatten(0, 1).index_select(0, places_L), targets_L)


def choose(
    performance: Performance, llm: PreTrainedModel, prefix: tuple[int, ...], device: torch.device
) -> Shortcuts:
    """prefix: tokens with which the run's examples begin. `auto` of packing counts as off.

    Raises ConfigError for what is asked for and cannot be had.
    """
    plain = performance.preset == "plain"
    longest = longest_row(llm)
    attention = llm.config._attn_implementation or "eager"
    takes_masks = llm._supports_attention_backend and longest != 0
    kind: MaskKind = MASK_KINDS.get(attention, "rows") if takes_masks else "rows"
    name = type(llm).__name__
    if performance.packing == "on" and kind == "rows":
        raise ConfigError(
            f"performance.packing=on: {name} with model.llm.attention={attention} takes no mask "
            "that keeps the examples of a row apart; set performance.packing=off"
        )
    llm_trains = any(parameter.requires_grad for parameter in llm.parameters())
    reason = why_not_cached(performance, llm_trains=llm_trains, longest_row=longest)
    if reason is not None:
        if reason and prefix:
            logger.info("performance.prefix_cache: the prompt is run in every row: %s", reason)
        prefix = ()
    head = plain_head(llm)
    if performance.label_logits and head is None:
        logger.info("performance.logits_megabytes: %s makes its logits itself, in one piece", name)
    if performance.head == "liger":
        if not performance.label_logits:
            raise ConfigError(
                "performance.head=liger makes logits of trained positions only; set "
                "performance.label_logits=true or performance.head=torch"
            )
        refuse_liger(device, head, llm.config.model_type)
    return Shortcuts(
        plain=plain,
        prefix=Prefix(prefix),
        packing=performance.packing == "on" and not plain,
        mask_kind=kind,
        longest_row=longest,
        label_logits=performance.label_logits,
        logits_megabytes=performance.logits_megabytes,
        liger=performance.head == "liger",
        head=head,
    )

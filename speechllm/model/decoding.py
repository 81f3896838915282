"""Greedy decoding and beam search over any causal LLM; the same text as transformers' `generate`.

Shape legend: B utterances, S positions of a prompt, W width of embeddings, Q beams, N candidates,
T longest output, C columns of keys and values, P tokens of the shared prefix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transformers import GenerationConfig, PreTrainedModel

from speechllm.log import logger
from speechllm.model.decoding_cache import Beams, KeysValues, attention_of_beams, can_hold

NONE = -1.0e9  # transformers' score of what does not count
CROWDED = 0.75  # rows that have ended are removed where no more than this part goes on


@dataclass(frozen=True)
class Decoding:
    """max_new_tokens: the end token included. length_penalty: power of the length by which the
    score of a beam is divided. end_token_ids: any of them ends a row. plain: by transformers'
    own `generate`."""

    max_new_tokens: int
    num_beams: int
    length_penalty: float
    end_token_ids: tuple[int, ...]
    pad_id: int
    plain: bool = False


@dataclass(frozen=True)
class Choice:
    """rows: those of before that go on, None for all. tokens_BQ, parents_BQ: of these, what each
    beam says next and which beam it goes on from."""

    tokens_BQ: Tensor
    parents_BQ: Tensor
    rows: Tensor | None


class Search(Protocol):
    said: list[list[int]]
    """For each row of the batch, when it has ended: the ids before its end token."""

    def choose(self, logits_BQV: Tensor) -> Choice | None:
        """None when all rows have ended."""


@torch.no_grad()
def decode(
    llm: PreTrainedModel,
    embeds_BSW: Tensor,
    attention_mask_BS: Tensor,
    settings: Decoding,
    *,
    prefix: Sequence[KeysValues] = (),
    any_rank: Callable[[bool], bool] | None = None,
) -> list[list[int]]:
    """What follows each prompt: the ids before its end token, or max_new_tokens without one.

    Args:
        attention_mask_BS: the prompts are padded on the left.
        prefix: of every layer, keys and values of the P tokens with which every prompt begins;
            empty where that is none.
        any_rank: a collective, whether any rank goes on; given where weights are sharded, so that
            every forward is a collective too. The ranks then go on together until the last is done.
    """
    if settings.plain or not can_hold(llm):
        if not settings.plain:
            _say_that_it_cannot(type(llm).__name__)
        return _by_transformers(
            llm, embeds_BSW, attention_mask_BS, settings, synced=any_rank is not None
        )
    goes_on = any_rank or bool
    beams = Beams(llm, settings.num_beams, prefix)
    logits_BQV = read_prompts(beams, embeds_BSW, attention_mask_BS)
    kind = Greedy if settings.num_beams == 1 else BeamSearch
    search: Search = kind(settings, len(embeds_BSW), embeds_BSW.device)
    choice = search.choose(logits_BQV)
    with attention_of_beams(llm):
        while goes_on(choice is not None):
            if choice is None:
                llm(input_ids=attention_mask_BS.new_zeros(1, 1), use_cache=False)
                continue
            if choice.rows is not None:
                beams.keep(choice.rows)
            choice = search.choose(beams.say(choice.tokens_BQ, choice.parents_BQ))
    return search.said


def read_prompts(beams: Beams, embeds_BSW: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Logits [B, 1, V] of what follows each prompt; of a shared prefix nothing is computed."""
    shared = beams.layers[0].used
    nth_BS = attention_mask_BS.cumsum(1)
    # Without the first P columns, a row that is padded still has as much of the prefix as it has
    # padding.
    left_BS = attention_mask_BS.bool() & (nth_BS > shared)
    real_BC = torch.cat((left_BS.new_ones(len(left_BS), shared), left_BS[:, shared:]), dim=1)
    positions_BS = (nth_BS - 1).clamp(min=0)[:, shared:]
    return beams.read(embeds_BSW[:, shared:], real_BC, positions_BS)


class Greedy:
    """The likeliest token each time."""

    def __init__(self, settings: Decoding, rows: int, device: torch.device) -> None:
        self.settings = settings
        self.said: list[list[int]] = [[] for _ in range(rows)]
        self.ends = torch.tensor(settings.end_token_ids, device=device)
        self.rows_B = torch.arange(rows, device=device)
        self.said_BT = torch.zeros(
            (rows, settings.max_new_tokens), dtype=torch.int64, device=device
        )
        self.ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.length = 0

    def choose(self, logits_BQV: Tensor) -> Choice | None:
        tokens_B = logits_BQV[:, 0].argmax(-1)
        self.said_BT[:, self.length] = tokens_B
        self.length += 1
        self.ended_B = self.ended_B | torch.isin(tokens_B, self.ends)
        left = int(self.ended_B.logical_not().sum())
        if left == 0 or self.length == self.settings.max_new_tokens:
            self._keep_what_was_said(torch.ones_like(self.ended_B))
            return None
        rows = None
        if left <= CROWDED * len(tokens_B):
            self._keep_what_was_said(self.ended_B)
            rows = self.ended_B.logical_not().nonzero().squeeze(1)
            self.rows_B, self.said_BT = self.rows_B[rows], self.said_BT[rows]
            self.ended_B, tokens_B = self.ended_B[rows], tokens_B[rows]
        return Choice(tokens_B[:, None], torch.zeros_like(tokens_B)[:, None], rows)

    def _keep_what_was_said(self, which_B: Tensor) -> None:
        said = self.said_BT[which_B, : self.length].tolist()
        for row, tokens in zip(self.rows_B[which_B].tolist(), said, strict=True):
            self.said[row] = until_end(tokens, self.settings.end_token_ids)


class _Row(NamedTuple):
    """What beam search knows of each row; every tensor has a first axis B."""

    number_B: Tensor  # among those of the batch
    open_B: Tensor
    scores_BQ: Tensor  # of the beams that go on, and what they have said
    said_BQT: Tensor
    ended_scores_BQ: Tensor  # of the best that have ended, NONE where none has
    ended_said_BQT: Tensor
    has_ended_BQ: Tensor


class BeamSearch:
    """As transformers' beam search with early_stopping=False, operation by operation, so that
    rounding and ties fall as they do there: a row is closed once all its beams have ended and the
    best open one, if it ended here, would not be better than the worst of them."""

    def __init__(self, settings: Decoding, rows: int, device: torch.device) -> None:
        self.settings = settings
        self.said: list[list[int]] = [[] for _ in range(rows)]
        self.ends = torch.tensor(settings.end_token_ids, device=device)
        # Of each beam the ends may come first, and as many others must be left to go on.
        self.candidates = max(2, 1 + len(settings.end_token_ids)) * settings.num_beams
        self.counts_N = torch.arange(self.candidates, device=device) < settings.num_beams
        ended, longest = (rows, settings.num_beams), settings.max_new_tokens
        self.row = _Row(
            number_B=torch.arange(rows, device=device),
            open_B=torch.ones(rows, dtype=torch.bool, device=device),
            scores_BQ=torch.zeros((rows, 1), device=device),
            said_BQT=torch.zeros((rows, 1, longest), dtype=torch.int64, device=device),
            ended_scores_BQ=torch.full(ended, NONE, device=device),
            ended_said_BQT=torch.zeros((*ended, longest), dtype=torch.int64, device=device),
            has_ended_BQ=torch.zeros(ended, dtype=torch.bool, device=device),
        )
        self.length = 0

    def choose(self, logits_BQV: Tensor) -> Choice | None:
        vocabulary = logits_BQV.shape[2]
        totals_BQV = logits_BQV.float().log_softmax(-1) + self.row.scores_BQ[:, :, None]
        scores_BN, places_BN = totals_BQV.flatten(1).topk(self.candidates)
        parents_BN, tokens_BN = places_BN // vocabulary, places_BN % vocabulary
        said_BNT = _of_beams(self.row.said_BQT, parents_BN)
        said_BNT[:, :, self.length] = tokens_BN
        self.length += 1
        is_last = self.length == self.settings.max_new_tokens
        ends_BN = torch.isin(tokens_BN, self.ends) | is_last

        going_BN = scores_BN + ends_BN.float() * NONE
        going_BQ = going_BN.topk(self.settings.num_beams).indices
        self.row = self.row._replace(
            scores_BQ=going_BN.gather(1, going_BQ), said_BQT=_of_beams(said_BNT, going_BQ)
        )
        self._end(scores_BN, said_BNT, ends_BN & self.counts_N)

        left = int(self.row.open_B.sum())
        if left == 0 or is_last:
            self._keep_what_was_said(torch.ones_like(self.row.open_B))
            return None
        tokens_BQ, parents_BQ = tokens_BN.gather(1, going_BQ), parents_BN.gather(1, going_BQ)
        if left > CROWDED * len(tokens_BQ):
            return Choice(tokens_BQ, parents_BQ, None)
        self._keep_what_was_said(~self.row.open_B)
        rows = self.row.open_B.nonzero().squeeze(1)
        self.row = _Row._make(tensor[rows] for tensor in self.row)
        return Choice(tokens_BQ[rows], parents_BQ[rows], rows)

    def _end(self, scores_BN: Tensor, said_BNT: Tensor, ends_BN: Tensor) -> None:
        """Put those that end among the best that have ended; close what cannot get better."""
        row = self.row
        divisor = self.length**self.settings.length_penalty
        scores_BN = scores_BN / divisor
        scores_BN = scores_BN + (~row.open_B[:, None]).float() * NONE
        scores_BN = scores_BN + (~ends_BN).float() * NONE
        all_scores = torch.cat((row.ended_scores_BQ, scores_BN), dim=1)
        best_BQ = all_scores.topk(self.settings.num_beams).indices
        ended_scores_BQ = all_scores.gather(1, best_BQ)
        has_ended_BQ = torch.cat((row.has_ended_BQ, ends_BN), dim=1).gather(1, best_BQ)
        reachable_B1 = row.scores_BQ[:, :1] / divisor
        worst_BQ = torch.where(has_ended_BQ, ended_scores_BQ.min(dim=1, keepdim=True).values, NONE)
        self.row = row._replace(
            open_B=row.open_B & (reachable_B1 > worst_BQ).any(1),
            ended_scores_BQ=ended_scores_BQ,
            ended_said_BQT=_of_beams(torch.cat((row.ended_said_BQT, said_BNT), dim=1), best_BQ),
            has_ended_BQ=has_ended_BQ,
        )

    def _keep_what_was_said(self, which_B: Tensor) -> None:
        said = self.row.ended_said_BQT[which_B, 0, : self.length].tolist()
        for row, tokens in zip(self.row.number_B[which_B].tolist(), said, strict=True):
            self.said[row] = until_end(tokens, self.settings.end_token_ids)


def _of_beams(values_BQT: Tensor, which_BN: Tensor) -> Tensor:
    return values_BQT.gather(1, which_BN[:, :, None].expand(-1, -1, values_BQT.shape[2]))


def until_end(row: list[int], end_token_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(row):
        if token in end_token_ids:
            return row[:place]
    return row


def _by_transformers(
    llm: PreTrainedModel,
    embeds_BSW: Tensor,
    attention_mask_BS: Tensor,
    settings: Decoding,
    *,
    synced: bool,
) -> list[list[int]]:
    generation = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        # transformers warns of one that greedy decoding has no use for
        length_penalty=settings.length_penalty if settings.num_beams > 1 else 1.0,
        do_sample=False,
        eos_token_id=list(settings.end_token_ids),
        pad_token_id=settings.pad_id,
    )
    model: Any = llm  # `generate` comes with every causal LLM, but not with its base class
    rows = model.generate(
        inputs_embeds=embeds_BSW,
        attention_mask=attention_mask_BS,
        generation_config=generation,
        synced_gpus=synced,
    )
    return [until_end(row, settings.end_token_ids) for row in rows.tolist()]


@cache
def _say_that_it_cannot(name: str) -> None:
    logger.info(
        "decoding by transformers' own generate: %s has layers that do not attend to everything "
        "(sliding windows, states, ...) or an attention that cannot be chosen",
        name,
    )

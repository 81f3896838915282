"""Loss, token accuracy and, on a subset, WER over a validation split, by all ranks together."""

from __future__ import annotations

import numpy as np
import torch

from speechllm.config.schema import Config
from speechllm.data.loader import read_batches
from speechllm.data.plan import plan_in_order, rank_share
from speechllm.decode import decode, decoded_together
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prepare import Split, TextSide
from speechllm.transfer import Transfer
from speechllm.wer import score
from speechllm.world import World


def evaluate(
    model: SpeechLLM, split: Split, text: TextSide, config: Config, world: World
) -> dict[str, float]:
    """{"loss" (nats a target token), "token_accuracy", "utterances"} and, where
    evaluation.wer_utterances is set, "wer" (fractions)."""
    model.eval()
    scores = _loss(model, split, text, config, world)
    if config.evaluation.wer_utterances:
        scores["wer"] = _wer(model, split, text, config, world)
    model.train()
    return scores


def evenly(numbers: np.ndarray, count: int) -> np.ndarray:
    """`count` of `numbers`, evenly spaced; all where there are fewer or count is 0."""
    if not 0 < count < len(numbers):
        return numbers
    return numbers[np.arange(count) * len(numbers) // count]


@torch.no_grad()
def _loss(
    model: SpeechLLM, split: Split, text: TextSide, config: Config, world: World
) -> dict[str, float]:
    chosen = evenly(split.selection.kept, config.evaluation.max_utterances)
    cut = plan_in_order(split.costs, chosen, config.data.microbatch_tokens)
    share = rank_share(len(cut), world.rank, world.size)
    batches = read_batches(
        split.store,
        text.prompter,
        text.audio_tokens,
        text.pad_id,
        [cut[number] for number, _ in share],
        with_target=True,
        pad_left=False,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
    )
    mine = torch.zeros(3, dtype=torch.float64, device=world.device)
    heard = 0
    to_device = Transfer(world.device)
    for (_, is_repeat), microbatch in zip(share, batches, strict=True):
        # A repeat is run all the same, so that the collectives of sharded strategies match.
        sums = model(to_device(microbatch.batch))
        if not is_repeat and microbatch.weight > 0:
            mine += torch.stack([value.double() for value in sums])
            heard += microbatch.utterances
    loss, correct, tokens, utterances = world.sum([*mine.tolist(), heard])
    return {
        "loss": loss / max(tokens, 1),
        "token_accuracy": correct / max(tokens, 1),
        "utterances": utterances,
    }


def _wer(model: SpeechLLM, split: Split, text: TextSide, config: Config, world: World) -> float:
    chosen = evenly(split.selection.kept, config.evaluation.wer_utterances)
    cut = decoded_together(config, split.costs, chosen)
    share = rank_share(len(cut), world.rank, world.size)
    if not model.sharded:  # else all ranks run as many, or the collectives would not match
        share = [(number, is_repeat) for number, is_repeat in share if not is_repeat]
    decoded = decode(model, split, text, config, world.device, [cut[number] for number, _ in share])
    mine = [
        [row.ref, row.hyp]
        for (_, is_repeat), rows in zip(share, decoded, strict=True)
        for row in rows
        if not is_repeat
    ]
    pairs = [pair for pairs in world.gather(mine) for pair in pairs]
    result = score(
        [ref for ref, _ in pairs], [hyp for _, hyp in pairs], config.generation.normalizer
    )
    return float(result["wer"])

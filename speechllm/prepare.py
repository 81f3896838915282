"""From a configuration to the parts that training, evaluation and decoding share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from transformers import PreTrainedTokenizerBase

from speechllm.config.schema import Config
from speechllm.data.cache import BlockCache
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.plan import ORDER, EpochPlan, PlanSettings, plan_epoch
from speechllm.data.plan_table import PlanTable
from speechllm.data.prompt import Prompter
from speechllm.data.selection import CostSettings, Selection, populate
from speechllm.data.store import Store
from speechllm.errors import ConfigError, DataError
from speechllm.log import logger
from speechllm.model.build import AudioTokens, audio_token_counter, bf16_is_fast, build_model
from speechllm.model.pretrained import load_tokenizer
from speechllm.model.speech_llm import SpeechLLM
from speechllm.strategy.build import frozen_weights, loading


@dataclass(frozen=True)
class TextSide:
    """What turns an utterance into an example; needs no weights."""

    tokenizer: PreTrainedTokenizerBase
    prompter: Prompter
    audio_tokens: AudioTokens
    pad_id: int


@dataclass(frozen=True)
class Split:
    """The shards of one split, and which of their utterances are used."""

    corpus: Corpus
    store: Store
    costs: np.ndarray  # int32 [utterances], LLM positions
    selection: Selection
    hours: float  # of audio that is used
    table: PlanTable


def settle_precision(config: Config, device: torch.device) -> Config:
    """The configuration with `precision: auto` replaced by what suits the device."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": "bf16" if bf16_is_fast(device) else "fp32"})


def prepare_text(config: Config) -> TextSide:
    tokenizer = load_tokenizer(config.model.llm)
    prompter = Prompter(tokenizer, config.model.prompt, config.seed)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prompter.end_token_id
    return TextSide(tokenizer, prompter, audio_token_counter(config.model), pad_id)


def prepare_model(
    config: Config,
    device: torch.device,
    *,
    ctc: bool = False,
    sharded: bool = False,
    training: bool = False,
) -> SpeechLLM:
    """`sharded`: leave the frozen weights as the configured strategy wants them; else load them.
    `training`: with what saves memory or time in training only, where the configuration says so.

    Raises ModelError, ConfigError.
    """
    assert config.precision != "auto", "settle_precision comes first"
    if training and config.train.compile and frozen_weights(config) == "partitioned":
        raise ConfigError(
            "train.compile does not work with DeepSpeed's stage 3, which fetches and frees weights "
            "around each module within what would be compiled; set train.compile=false, or take "
            "strategy.kind=fsdp2"
        )
    with loading(config) if sharded else nullcontext():
        return build_model(
            config.model,
            precision=config.precision,
            device=device,
            seed=config.seed,
            ctc=ctc,
            frozen_on_meta=sharded and frozen_weights(config) == "meta",
            activation_checkpointing=training and config.train.activation_checkpointing,
            compile_layers=training and config.train.compile,
        )


def open_split(
    config: Config, patterns: Sequence[str], text: TextSide, *, key: str, budget: int
) -> Split:
    """Raises ConfigError without `patterns`, DataError where nothing is left; both name `key`."""
    if not patterns:
        raise ConfigError(f"{key} is not set; give a directory or glob of shards: {key}=DIR")
    corpus = open_corpus(patterns, open_cache(config))
    settings = CostSettings(
        text.prompter.max_prompt_tokens,
        config.data.characters_per_token,
        config.data.min_seconds,
        config.data.max_seconds,
        budget,
    )
    found = populate(corpus, text.audio_tokens, settings)
    selection = found.selection
    for reason, numbers in selection.dropped.items():
        if len(numbers):
            logger.warning(
                "%s: %d of %d utterances dropped (%s), the first is %s",
                key,
                len(numbers),
                len(corpus),
                reason,
                corpus.key(int(numbers[0])),
            )
    if not len(selection.kept):
        drops = {reason: len(numbers) for reason, numbers in selection.dropped.items()}
        raise DataError(
            f"{key}: none of the {len(corpus)} utterances can be used (dropped: {drops}); "
            "see data.min_seconds, data.max_seconds and data.microbatch_tokens"
        )
    return Split(corpus, Store(corpus), found.costs, selection, found.hours, found.table)


def open_cache(config: Config) -> BlockCache | None:
    """Raises ConfigError where the directory cannot be made."""
    if config.data.cache_dir is None:
        return None
    return BlockCache(config.data.cache_dir, int(config.data.cache_size * 2**30))


def plan_settings(config: Config) -> PlanSettings:
    return PlanSettings(
        seed=config.seed,
        microbatch_tokens=config.data.microbatch_tokens,
        microbatches_per_step=config.data.microbatches_per_step,
        window=config.data.window,
    )


def epoch_plans(config: Config, split: Split) -> Callable[[int], EpochPlan]:
    """The plan of each epoch; the last two are remembered."""

    @lru_cache(maxsize=2)
    def plan_of(epoch: int) -> EpochPlan:
        return plan_epoch(
            split.corpus.shard_sizes,
            split.costs,
            split.selection.kept,
            plan_settings(config),
            epoch,
            split.table,
        )

    return plan_of


def data_identity(config: Config, split: Split) -> dict[str, Any]:
    """What the order of the data follows from. A run resumes only where all of it is the same."""
    settings = plan_settings(config)
    return {
        "data": {
            "train": list(config.data.train),
            "utterances": len(split.selection.kept),
            "hash": f"{split.corpus.fingerprint}:{len(split.selection.kept)}",
        },
        "data order": ORDER,
        "seed": settings.seed,
        "data.microbatch_tokens": settings.microbatch_tokens,
        "data.microbatches_per_step": settings.microbatches_per_step,
        "data.window": settings.window,
        "data.characters_per_token": config.data.characters_per_token,
    }

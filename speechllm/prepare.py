"""From a configuration to the parts that training, evaluation and decoding share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transformers import PreTrainedTokenizerBase

from speechllm.config.data import DatasetPrompt
from speechllm.config.model import Prompt
from speechllm.config.schema import Config
from speechllm.data.cache import BlockCache
from speechllm.data.files import local_path
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.mixture import Mixture
from speechllm.data.plan import PlanSettings
from speechllm.data.plan_table import PlanTable
from speechllm.data.prefix import common_prefix
from speechllm.data.prompt import Prompter, Tokens
from speechllm.data.selection import CostSettings, Selection, TextTokens, populate
from speechllm.data.store import Store
from speechllm.data.text_tokens import count_texts
from speechllm.errors import ConfigError, DataError
from speechllm.log import logger
from speechllm.model.build import AudioTokens, audio_token_counter, build_model
from speechllm.model.pretrained import load_tokenizer
from speechllm.model.speech_llm import SpeechLLM
from speechllm.strategy.build import frozen_weights, loading
from speechllm.types import SAMPLE_RATE

# Up to so many, data.text_tokens=auto counts: two minutes of one core.
COUNTED_UTTERANCES = 1_000_000


@dataclass(frozen=True)
class TextSide:
    """What turns an utterance into an example; needs no weights."""

    tokenizer: PreTrainedTokenizerBase
    prompter: Prompter
    prompters: Mapping[str, Prompter]  # of the data sets of data.mixture
    audio_tokens: AudioTokens
    pad_id: int

    @property
    def prefix(self) -> Tokens:
        """With which every example of the run begins, unless its utterance has a prompt of its
        own."""
        return common_prefix(p.prefix for p in (self.prompter, *self.prompters.values()))

    @property
    def advice(self) -> list[str]:
        """What would be better in the prompts."""
        found = (p.advice for p in (self.prompter, *self.prompters.values()))
        return sorted({advice for advice in found if advice is not None})


@dataclass(frozen=True)
class Split:
    """The shards of one split, and which of their utterances are used."""

    corpus: Corpus
    store: Store
    cost_settings: CostSettings
    costs: np.ndarray  # int32 [utterances], LLM positions
    selection: Selection
    hours: float  # of audio that is used
    table: PlanTable
    prompters: tuple[Prompter, ...]  # one, or one of each shard
    texts: TextTokens | None = None  # where they were counted
    mixture: Mixture | None = None


def prepare_text(config: Config) -> TextSide:
    tokenizer = load_tokenizer(config.model.llm)
    prompter = Prompter(tokenizer, config.model.prompt, config.seed)
    prompters = {
        name: _dataset_prompter(config, part.prompt, tokenizer) or prompter
        for name, part in config.data.mixture.items()
    }
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prompter.end_token_id
    return TextSide(tokenizer, prompter, prompters, audio_token_counter(config.model), pad_id)


def _dataset_prompter(
    config: Config, prompt: DatasetPrompt, tokenizer: PreTrainedTokenizerBase
) -> Prompter | None:
    """None where the prompt is the general one. Raises ConfigError where it cannot be used."""
    changes: dict[str, Any] = {"texts": prompt.texts} if prompt.texts else {}
    if prompt.system is not None:
        changes["system"] = prompt.system
    if not changes:
        return None
    whole = Prompt.model_validate(config.model.prompt.model_dump() | changes)
    return Prompter(tokenizer, whole, config.seed)


def prepare_model(
    config: Config,
    device: torch.device,
    *,
    prefix: Tokens = (),
    ctc: bool = False,
    sharded: bool = False,
    training: bool = False,
) -> SpeechLLM:
    """`prefix`: as `TextSide` has it; without, none is kept. `sharded`: leave the frozen weights as
    the configured strategy wants them; else load them. `training`: with what saves memory or time
    in training only, where the configuration says so.

    Raises ModelError, ConfigError.
    """
    assert config.precision != "auto", "settle comes first"
    if training and config.train.compile and frozen_weights(config) == "partitioned":
        raise ConfigError(
            "train.compile does not work with DeepSpeed's stage 3, which fetches and frees weights "
            "around each module within what would be compiled; set train.compile=false, or take "
            "strategy.kind=fsdp2"
        )
    with loading(config, device) if sharded else nullcontext():
        return build_model(
            config.model,
            precision=config.precision,
            device=device,
            seed=config.seed,
            performance=config.performance,
            prefix=prefix,
            ctc=ctc,
            frozen_on_meta=sharded and frozen_weights(config) == "meta",
            activation_checkpointing=training and config.train.activation_checkpointing is True,
            compile_layers=training and config.train.compile,
        )


def open_split(
    config: Config,
    patterns: Sequence[str],
    text: TextSide,
    *,
    key: str,
    budget: int,
    prompters: tuple[Prompter, ...] = (),
    rate: int = SAMPLE_RATE,
    count: bool = False,
) -> Split:
    """Raises ConfigError without `patterns`, DataError where nothing is left; both name `key`.

    prompters: of each shard, where their prompts are not the general one. rate: Hz at which costs
    take the audio to be. count: the tokens of the texts, as far as data.text_tokens wants it.
    """
    if not patterns:
        raise ConfigError(f"{key} is not set; give a directory or glob of shards: {key}=DIR")
    corpus = open_corpus(patterns, open_cache(config))
    prompt_tokens = tuple(prompter.max_prompt_tokens for prompter in prompters)
    prompters = prompters or (text.prompter,)
    settings = CostSettings(
        prompt_tokens or text.prompter.max_prompt_tokens,
        config.data.characters_per_token,
        config.data.min_seconds,
        config.data.max_seconds,
        budget,
        rate,
    )
    texts = None
    if count and _texts_are_counted(config, corpus):
        texts = count_texts(corpus, prompters, config.data.characters_per_token)
    found = populate(corpus, text.audio_tokens, settings, texts)
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
    return Split(
        corpus=corpus,
        store=Store(corpus),
        cost_settings=settings,
        costs=found.costs,
        selection=selection,
        hours=found.hours,
        table=found.table,
        prompters=prompters,
        texts=texts,
    )


def _texts_are_counted(config: Config, corpus: Corpus) -> bool:
    """Raises ConfigError where they are to be and cannot."""
    wanted = config.data.text_tokens
    remote = next((tar for tar in corpus.shards if local_path(tar) is None), None)
    if wanted == "exact" and remote is not None:
        raise ConfigError(
            f"data.text_tokens=exact: {remote} is remote, and all texts would have to be fetched "
            "before the first step; set data.text_tokens=estimate, or copy the shards"
        )
    few = remote is None and len(corpus) <= COUNTED_UTTERANCES
    return wanted == "exact" or (wanted == "auto" and few)


def open_cache(config: Config) -> BlockCache | None:
    """Raises ConfigError where the directory cannot be made."""
    if config.data.cache_dir is None:
        return None
    return BlockCache(config.data.cache_dir, int(config.data.cache_size * 2**30))


def plan_settings(config: Config) -> PlanSettings:
    """Under `preset: plain` the budget counts utterances, each of which costs one."""
    plain = config.performance.preset == "plain"
    return PlanSettings(
        seed=config.seed,
        microbatch_tokens=(
            config.performance.plain_utterances if plain else config.data.microbatch_tokens
        ),
        microbatches_per_step=config.data.microbatches_per_step,
        window=config.data.window,
    )

"""What a run is trained on: shards or a mixture, the plans of its epochs, its batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from speechllm.config.schema import Config
from speechllm.data.augment import is_on, slowest_rate, speed_rates
from speechllm.data.augmenter import Augmenter
from speechllm.data.keys import hash_keys
from speechllm.data.loader import TrainLoader
from speechllm.data.mixture import epoch_utterances, owners_of_shards, plan_mixture, spread
from speechllm.data.plan import ORDER, EpochPlan, plan_epoch
from speechllm.data.plan_table import PlanTable, plan_table
from speechllm.data.selection import costs_at
from speechllm.data.shared import SHARED_UTTERANCES, shared_arrays
from speechllm.features import read_features
from speechllm.model.build import audio_token_counter
from speechllm.prepare import Split, TextSide, open_split, plan_settings
from speechllm.types import SAMPLE_RATE


def open_training(config: Config, text: TextSide, *, budget: int | None = None) -> Split:
    """The split of data.train or data.mixture. Its costs, and so what is dropped as over the
    budget, are those at the slowest speed that data.augmentation can draw.

    budget: in place of data.microbatch_tokens. Raises ConfigError or DataError, as `open_split`.
    """
    data = config.data
    budget = data.microbatch_tokens if budget is None else budget
    rate = slowest_rate(data.augmentation.speed)
    if not data.mixture:
        return open_split(
            config, data.train, text, key="data.train", budget=budget, rate=rate, count=True
        )
    owners = owners_of_shards(data.mixture)
    split = open_split(
        config,
        list(owners),
        text,
        key="data.mixture",
        budget=budget,
        rate=rate,
        prompters=tuple(text.prompters[name] for name in owners.values()),
        count=True,
    )
    mixture = plan_mixture(
        data.mixture,
        data.temperature,
        tuple(owners.values()),
        split.corpus.shard_sizes,
        split.selection.kept,
        split.corpus.durations,
    )
    return replace(split, mixture=mixture)


def training_key(config: Config) -> str:
    """What of the configuration names the training data."""
    return "data.mixture" if config.data.mixture else "data.train"


def epoch_plans(config: Config, split: Split) -> Callable[[int], EpochPlan]:
    """The plan of each epoch; the last two are remembered."""
    settings, speed = plan_settings(config), config.data.augmentation.speed
    corpus, kept = split.corpus, split.selection.kept
    plain = config.performance.preset == "plain"
    own_costs, table = split.costs, split.table
    prompts_differ = any(len(set(p.prompt_tokens)) > 1 for p in split.prompters)
    shorter = split.texts is not None and prompts_differ and not plain
    if plain:  # batches of so many utterances, whatever their lengths, in random order
        own_costs = np.ones_like(split.costs)
        table = plan_table(corpus.shard_sizes, own_costs, kept, settings.microbatch_tokens)

    def usual(epoch: int) -> EpochPlan:
        return plan_epoch(corpus.shard_sizes, own_costs, kept, settings, epoch, table)

    if split.mixture is None and not shorter and (plain or not speed.probability):
        return lru_cache(maxsize=2)(usual)

    @cache
    def hashes() -> np.ndarray:
        return hash_keys(corpus.column("key"))

    def arrays(epoch: int) -> dict[str, np.ndarray]:
        costs, taken, sizes = own_costs, kept, corpus.shard_sizes
        if speed.probability and not plain:
            rates = speed_rates(speed, config.seed, epoch, hashes())
            costs = costs_at(
                corpus, audio_token_counter(config.model), split.cost_settings, rates, split.texts
            )
        if shorter:
            costs = costs - _shorter_prompts(split, epoch)
        if split.mixture is not None:
            heard = epoch_utterances(split.mixture.parts, config.seed, epoch)
            taken, sizes = spread(heard, sizes)
        table = plan_table(sizes, costs[taken], np.arange(len(taken)), settings.microbatch_tokens)
        return {"costs": costs, "taken": taken, **vars(table)}

    @lru_cache(maxsize=2)
    def plan_of(epoch: int) -> EpochPlan:
        if len(corpus) < SHARED_UTTERANCES:
            found = arrays(epoch)
        else:
            # Of the model, how many tokens an audio and each of the prompts take.
            model = config.model.model_dump(mode="json")
            data = data_identity(config, split)
            facts = [data, repr(split.cost_settings), epoch, plain, model]
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
            found = shared_arrays("epoch", key, lambda: arrays(epoch))
        table = PlanTable(found["bounds"], found["rows"], found["counts"])
        return EpochPlan(found["costs"], found["taken"], table, settings, epoch)

    return plan_of


def _shorter_prompts(split: Split, epoch: int) -> np.ndarray:
    """By how many tokens the prompt that each utterance gets in that epoch is shorter than the
    longest of those it may get: int32 [U]."""
    assert split.texts is not None
    corpus, prompters = split.corpus, split.prompters
    keys = corpus.column("key").chunks
    found = np.zeros(len(corpus), dtype=np.int32)
    first = 0
    for shard, size in enumerate(corpus.shard_sizes.tolist()):
        prompter = prompters[shard] if len(prompters) > 1 else prompters[0]
        saved = max(prompter.prompt_tokens) - np.array(prompter.prompt_tokens, dtype=np.int32)
        if saved.any():
            numbers = [prompter.text_number(key, epoch) for key in keys[shard].to_pylist()]
            found[first : first + size] = saved[numbers]
        first += size
    found[split.texts.prompts > 0] = 0
    return found


def train_loader(
    config: Config,
    split: Split,
    text: TextSide,
    plan_of: Callable[[int], EpochPlan],
    *,
    rank: int,
    world: int,
) -> TrainLoader:
    """The endless steps of a rank, of audio or, where `performance.encoder_cache` says so, of what
    the encoder made of it.

    Raises DataError where noises or responses are missing, ConfigError as `read_features`.
    """
    split = read_features(config, split, training_key(config))
    augmentation = config.data.augmentation
    of_shard = split.mixture.of_shard if split.mixture is not None else ()
    return TrainLoader(
        split.store,
        text.prompter,
        text.audio_tokens,
        text.pad_id,
        plan_of,
        rank=rank,
        world=world,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
        prompters=tuple(text.prompters[name] for name in of_shard),
        augmenter=Augmenter(augmentation, config.seed) if is_on(augmentation) else None,
    )


def data_identity(config: Config, split: Split) -> dict[str, Any]:
    """What the order of the data follows from. A run resumes only where all of it is the same."""
    settings, kept = plan_settings(config), len(split.selection.kept)
    speed = config.data.augmentation.speed
    about: dict[str, Any] = {
        "data": {
            "train": list(config.data.training_shards),
            "utterances": kept,
            "hash": f"{split.corpus.fingerprint}:{kept}",
        },
        "data order": ORDER,
        "seed": settings.seed,
        "data.microbatch_tokens": settings.microbatch_tokens,
        "data.microbatches_per_step": settings.microbatches_per_step,
        "data.window": settings.window,
    }
    if split.texts is None:
        about["data.characters_per_token"] = config.data.characters_per_token
    else:
        about["data.text_tokens"] = split.texts.digest
    if speed.probability:
        about["data.augmentation.speed"] = speed.model_dump(mode="json")
    if split.mixture is not None:
        prompts = {name: part.prompt for name, part in config.data.mixture.items()}
        takes = {
            part.name: {
                "utterances": len(part.kept),
                "per epoch": part.per_epoch,
                "prompt": prompts[part.name].model_dump(mode="json"),
            }
            for part in split.mixture.parts
        }
        facts = json.dumps([takes, split.mixture.of_shard], sort_keys=True)
        about["data.mixture"] = {**takes, "hash": hashlib.sha256(facts.encode()).hexdigest()}
    return about


def in_words(split: Split) -> list[str]:
    """One line for each data set of a mixture."""
    if split.mixture is None:
        return []
    lines = []
    for part in split.mixture.parts:
        shards = split.mixture.of_shard.count(part.name)
        hours = split.corpus.durations[part.kept].sum() / 3600
        times = part.per_epoch / len(part.kept)
        lines.append(
            f"{part.name}: {shards} shards, {len(part.kept)} utterances, {hours:.2f} h; "
            f"an epoch takes {part.per_epoch} ({times:.2f} times)"
        )
    return lines


def ctc_advice(config: Config, split: Split, text: TextSide) -> list[str]:
    """A line where targets, as far as they were counted, have no room in their audio tokens.

    CTC gives each token, and the end token, an audio token of its own; what does not fit counts as
    a loss of zero, so a run could look perfect and learn nothing.
    """
    if not config.train.ctc_steps or split.texts is None:
        return []
    kept = split.selection.kept
    samples = np.rint(split.corpus.durations[kept] * SAMPLE_RATE).astype(np.int64)
    longer = np.count_nonzero(split.texts.targets[kept] + 1 > text.audio_tokens(samples))
    if not longer:
        return []
    return [
        f"train.ctc_steps: {longer} of {len(kept)} utterances have more text tokens than audio "
        "tokens, and CTC learns nothing from these; a lower model.connector.downsampling_factor "
        "gives more audio tokens"
    ]

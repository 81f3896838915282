"""Every `auto` of a configuration replaced by its choice, so that the run's config.yaml says which.

Where training data are known, kernels are chosen by measurement on the device; else by rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transformers.utils import is_flash_attn_2_available

from speechllm.config.load import load_config
from speechllm.config.performance import PLAIN
from speechllm.config.schema import Config
from speechllm.config.section import Section
from speechllm.errors import ConfigError
from speechllm.log import logger
from speechllm.model.attention import GROUPED
from speechllm.model.build import COMPUTE_DTYPES, bf16_is_fast, frozen_type
from speechllm.model.families import KNOWN
from speechllm.model.layer_speed import (
    Rows,
    Way,
    attention_seconds,
    is_small,
    layer_shape,
    product_seconds,
    rows_to_time,
)
from speechllm.model.pretrained import usual_attention
from speechllm.planner.preference import machine_name, preferred, remembered_seconds
from speechllm.planner.room import machine_of_rank, needs_checkpointing
from speechllm.planner.workload import Utterance, microbatch
from speechllm.world import World

FLASH = "flash_attention_2"
# Bits of the result depend on these, so a run that goes on keeps them.
KEPT = ("precision", "model.llm.attention", "performance.packing")

Measure = Callable[..., dict[str, float]]


def settle(
    config: Config,
    device: torch.device,
    world: World | None = None,
    *,
    utterances: Sequence[Utterance] = (),
    recorded: Path | None = None,
    time_attention: Measure = attention_seconds,
    time_products: Measure = product_seconds,
) -> Config:
    """`config` without `auto`, but for `performance.prefix_cache`, whose `auto` means on.

    Rank 0 chooses and tells the others: with `world` a collective.

    Args:
        utterances: lengths in the training data, shortest first. Without them nothing is measured:
            what is not trained takes the rules' choice.
        recorded: config.yaml of the run's newest checkpoint, whose choices are taken where they
            can still run.
        time_attention: seconds of each way to attend, as `attention_seconds`.
        time_products: seconds of a matrix product in each precision, as `product_seconds`.

    Raises:
        ModelError: the LLM cannot be found.
    """
    if config.performance.preset == "plain":
        config = _plain(config)
    if world is None or world.is_main:
        if recorded is not None:
            config = _as_recorded(config, recorded, device)
        config = _precision(config, device, utterances, time_products)
        config = _attention(config, device, utterances, time_attention)
        config = _checkpointing(config, world.size if world else 1, device, utterances)
    if world is not None:
        found = {key: _value(config, key) for key in (*KEPT, "train.activation_checkpointing")}
        config = _with(config, world.from_main(found))
    if config.performance.prefix_cache == "auto" and config.model.lora.rank:
        logger.info("performance.prefix_cache is off: LoRA changes the prompt's keys and values")
        config = _with(config, {"performance.prefix_cache": "off"})
    return config


def measured_in_training(config: Config, device: torch.device) -> set[str]:
    """The keys that `settle` chooses by measurement once it knows the lengths of the training data.
    Raises ModelError."""
    config = _plain(config) if config.performance.preset == "plain" else config
    if is_small(config.model.llm):
        return set()
    found = set()
    if config.precision == "auto" and device.type == "cpu" and bf16_is_fast(device):
        found.add("precision")
    settled = _precision(config, device, (), product_seconds)
    usual, ways = _candidates(settled, device)
    if len({usual, *ways}) > 1:
        keys = ("model.llm.attention", "performance.packing")
        found |= {key for key in keys if _value(config, key) == "auto"}
    return found


def _plain(config: Config) -> Config:
    """The straightforward implementation, spelled out."""
    changes: dict[str, Any] = {f"performance.{key}": value for key, value in PLAIN.items()}
    if config.model.encoder.kind == "whisper":
        changes["model.encoder.context"] = "pad30"
    if config.model.llm.attention == "auto":
        changes["model.llm.attention"] = "sdpa"
    if config.train.activation_checkpointing == "auto":
        changes["train.activation_checkpointing"] = False
    return _with(config, changes)


def _as_recorded(config: Config, file: Path, device: torch.device) -> Config:
    try:
        before = load_config(str(file))
    except ConfigError as error:
        logger.warning("%s: choices of this run are made anew (%s)", file, error)
        return config
    for key in KEPT:
        found = _value(before, key)
        if _value(config, key) != "auto" or found == "auto":
            continue
        if found == FLASH and not _has_flash(device):
            logger.warning("%s=%s of %s cannot run here; chosen anew", key, found, file)
        elif key == "precision" and found != "fp32" and not bf16_is_fast(device):
            logger.warning("%s=%s of %s is very slow here; chosen anew", key, found, file)
        else:
            config = _with(config, {key: found})
    # To run layers again changes no bit; whether it is needed may change with the machine.
    if (
        config.train.activation_checkpointing == "auto"
        and before.train.activation_checkpointing is True
    ):
        config = _with(config, {"train.activation_checkpointing": True})
    return config


def _precision(
    config: Config, device: torch.device, utterances: Sequence[Utterance], measure: Measure
) -> Config:
    if config.precision != "auto":
        return config
    if not bf16_is_fast(device):
        return _with(config, {"precision": "fp32"})
    chosen = "bf16"
    if device.type == "cpu" and utterances and not is_small(config.model.llm):
        shape, rows = layer_shape(config.model.llm), _typical(config, utterances)
        positions = rows.rows * rows.columns
        about = {"products": shape._asdict(), "positions": positions, **machine_name(device)}
        seconds = remembered_seconds(about, lambda: measure(shape, positions, device))
        chosen = preferred("bf16", seconds)
        logger.info(
            "precision is %s: here bf16 runs the LLM's products %.2f times as fast as fp32",
            chosen,
            seconds["fp32"] / seconds["bf16"],
        )
    return _with(config, {"precision": chosen})


def _attention(
    config: Config, device: torch.device, utterances: Sequence[Utterance], measure: Measure
) -> Config:
    stored, computed = _types(config, device)
    kernel, packing = config.model.llm.attention, config.performance.packing
    usual, ways = _candidates(config, device)
    chosen = usual
    if len({usual, *ways}) > 1 and utterances and not is_small(config.model.llm):
        llm, shape = config.model.llm, layer_shape(config.model.llm)
        rows = rows_to_time(shape, _typical(config, utterances), device)
        if kernel == "auto" and packing != "on" and device.type == "cpu" and shape.kind in KNOWN:
            ways.append(Way(GROUPED, packed=False))
        candidates = tuple(dict.fromkeys((usual, *ways)))
        about = {
            "layer": shape._asdict(),
            "rows": rows,
            "types": [str(stored), str(computed)],
            "ways": candidates,
            **machine_name(device),
        }
        seconds = remembered_seconds(
            about,
            lambda: measure(llm, candidates, rows, stored=stored, computed=computed, device=device),
        )
        name = preferred(str(usual), seconds)
        chosen = next(way for way in candidates if str(way) == name)
        logger.info(
            "attention is %s: forward and backward of a layer over %d x %d positions take %s",
            chosen,
            *rows,
            ", ".join(f"{1e3 * value:.1f} ms ({way})" for way, value in seconds.items()),
        )
    return _with(
        config,
        {
            "model.llm.attention": chosen.kernel,
            "performance.packing": "on" if chosen.packed else "off",
        },
    )


def _checkpointing(
    config: Config, ranks: int, device: torch.device, utterances: Sequence[Utterance]
) -> Config:
    if config.train.activation_checkpointing != "auto":
        return config
    needed = False
    if utterances and not is_small(config.model.llm):
        needed = needs_checkpointing(config, machine_of_rank(ranks, device), utterances)
    return _with(config, {"train.activation_checkpointing": needed})


def _typical(config: Config, utterances: Sequence[Utterance]) -> Rows:
    """The microbatch of the middle length."""
    shape = microbatch(config, utterances[len(utterances) // 2], config.data.microbatch_tokens)
    assert shape is not None, "longer ones are not trained on"
    return Rows(shape.rows, shape.columns)


def _types(config: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the LLM's frozen weights, and of compute."""
    assert config.precision != "auto", "precision is settled first"
    return frozen_type(config.model, config.precision, device), COMPUTE_DTYPES[config.precision]


def _candidates(config: Config, device: torch.device) -> tuple[Way, list[Way]]:
    """The usual way, and those that the configuration allows."""
    stored, computed = _types(config, device)
    kernel, packing = config.model.llm.attention, config.performance.packing
    usual = Way(kernel if kernel != "auto" else usual_attention(device, stored), packing == "on")
    ways = [w for w in _ways(device, computed) if kernel in ("auto", w.kernel)]
    return usual, [w for w in ways if packing in ("auto", "on" if w.packed else "off")]


def _ways(device: torch.device, computed: torch.dtype) -> list[Way]:
    """All that can run here. Packed rows want a kernel that knows where each of them ends: an
    explicit mask over the whole row costs more than the padding of tight buckets."""
    ways = [Way("eager", packed=False), Way("sdpa", packed=False)]
    if computed != torch.float32 and _has_flash(device):
        ways += [Way(FLASH, packed=False), Way(FLASH, packed=True)]
    return ways


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and is_flash_attn_2_available()


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _with(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with the values of some dotted keys replaced."""
    for key, value in changes.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, names: Sequence[str], value: Any) -> Any:
    assert isinstance(section, Section)
    name, *rest = names
    inner = _replaced(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})

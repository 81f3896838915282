"""The ways to train that are compared: the plain path, and each shortcut added to those before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechllm.config.performance import Performance
from speechllm.config.schema import Config
from speechllm.data.augment import is_on
from speechllm.errors import ConfigError
from speechllm.planner.advice import LARGEST_BUDGET
from speechllm.prepare import prepare_text
from speechllm.training_data import open_training

CACHE_TOOL = Path(__file__).parent / "cache_features.py"
PLAIN, FULL = "plain", "full"


@dataclass(frozen=True)
class Way:
    """added: the shortcut that the way before has not."""

    name: str
    added: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """LLM positions of the utterances, as the plan counts them."""

    mean_cost: float
    largest_cost: int

    def overrides(self, batch: int, world: int) -> tuple[str, ...]:
        """A step of about `batch` utterances, one microbatch for each rank."""
        budget = max(self.largest_cost, round(batch * self.mean_cost / world))
        return f"data.microbatch_tokens={budget}", f"data.microbatches_per_step={world}"


def sizes(config: Config) -> Sizes:
    """Of the utterances in data.train."""
    split = open_training(config, prepare_text(config), budget=LARGEST_BUDGET)
    costs = split.costs[split.selection.kept]
    return Sizes(float(np.mean(costs)), int(costs.max()))


def ways(config: Config, plain_utterances: int) -> list[Way]:
    """From the plain path to the configuration as it is. Shortcuts that it does not take are left
    out; so is the encoder cache, whose files come later (see `cached`)."""
    shortcuts = _shortcuts(config)
    found = [Way(PLAIN, "plain path", _plain(plain_utterances))]
    added = "tight buckets in place of fixed batches"
    for number in range(len(shortcuts) + 1):
        missing = [override for _, off in shortcuts[number:] for override in off]
        name = FULL if number == len(shortcuts) else added
        found.append(Way(name, added, tuple(missing)))
        added = shortcuts[number][0] if number < len(shortcuts) else ""
    return found


def cached(config_file: str, config: Config, full: Way) -> Way | None:
    """With the encoder's outputs read from files, which are made first; None where the
    configuration does not allow that. Raises ConfigError where they cannot be made."""
    usable = config.model.encoder.kind == "whisper" and not config.model.unfreeze_encoder_layers
    if not usable or is_on(config.data.augmentation) or not CACHE_TOOL.is_file():
        return None
    command = [sys.executable, str(CACHE_TOOL), config_file, *full.overrides, "--dtype", "bf16"]
    if subprocess.run(command, stdout=sys.stderr.fileno()).returncode:
        raise ConfigError("tools/cache_features.py failed; its own words are above")
    overrides = (*full.overrides, "performance.encoder_cache=bf16")
    return Way("encoder cache", "encoder cache (bf16)", overrides)


def _shortcuts(config: Config) -> list[tuple[str, Sequence[str]]]:
    """Each with the overrides that take it away."""
    found: list[tuple[str, Sequence[str]]] = []
    performance = config.performance
    if config.model.encoder.kind == "whisper" and config.model.encoder.context == "trim":
        found.append(("encoder on the frames there are", ["model.encoder.context=pad30"]))
    if performance.label_logits:
        found.append(("logits of labels alone", ["performance.label_logits=false"]))
    if performance.prefix_cache == "auto":
        found.append(("prefix computed once", ["performance.prefix_cache=off"]))
    if config.model.llm.attention != "sdpa" or performance.packing != "off":
        off = ["model.llm.attention=sdpa", "performance.packing=off"]
        found.append(("attention and packing as measured", off))
    if performance.head != "torch":
        found.append(("fused head", ["performance.head=torch"]))
    if config.train.compile:
        found.append(("torch.compile", ["train.compile=false"]))
    return found


def _plain(utterances: int) -> tuple[str, ...]:
    """Every other key of the section as the preset wants it."""
    fields = Performance.model_fields.items()
    keys = {f"performance.{name}": field.default for name, field in fields}
    keys |= {"performance.preset": "plain", "performance.plain_utterances": utterances}
    keys |= {"train.compile": False, "model.llm.attention": "sdpa"}
    return tuple(f"{key}={value}" for key, value in keys.items())

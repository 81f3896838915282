"""How much of what the LLM runs in an epoch is padding, and which kind of column it comes from.

The epoch is that of the configuration's own plan; its texts are tokenised, no audio is decoded and
no model is built. The rows of a microbatch are as long as the longest of them: what a row lacks is
what it has less of than that row, of audio, target or prompt; a kind of which it has more counts
negative. JSON goes to standard output.

  python tools/bench_padding.py configs/demo.yaml data.text_tokens=estimate
  python tools/bench_padding.py configs/demo.yaml data.microbatch_tokens=768 data.train=DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from shard_console import run

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.text_tokens import count_texts
from speechllm.errors import ConfigError
from speechllm.prepare import Split, prepare_text
from speechllm.training_data import epoch_plans, open_training
from speechllm.types import SAMPLE_RATE

KINDS = ("audio", "target", "prompt")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="overrides")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(load_config(options.config, options.overrides)), indent=1))
    return 0


def measure(config: Config) -> dict[str, Any]:
    """Of epoch 0. Raises ConfigError for speeds, which change lengths from epoch to epoch."""
    if config.data.augmentation.speed.probability:
        raise ConfigError("data.augmentation.speed.probability is set; set it to 0 for this")
    text = prepare_text(config)
    split = open_training(config, text)
    corpus = split.corpus
    counted = split.texts or count_texts(corpus, split.prompters, 1.0)
    samples = np.rint(corpus.durations * SAMPLE_RATE).astype(np.int64)
    audio, prefix = text.audio_tokens(samples), len(text.prefix)
    plan = epoch_plans(config, split)(0).flat()
    positions, microbatches = 0, len(plan.microbatch_starts) - 1
    missing = np.zeros(len(KINDS), dtype=np.int64)
    overrun = 0
    for m in range(microbatches):
        numbers = plan.microbatch(m)
        prompts = [_prompt_tokens(split, counted.prompts, i) for i in numbers.tolist()]
        rows = np.stack([audio[numbers], counted.targets[numbers], prompts], axis=1)
        lengths = rows.sum(axis=1)
        longest = int(lengths.argmax())
        missing += (rows[longest] - rows).sum(axis=0)
        positions += len(rows) * int(lengths[longest] - prefix)
        budget = config.data.microbatch_tokens
        overrun = max(overrun, len(rows) * int(lengths[longest]) - budget)
    return {
        "utterances": len(plan.utterances),
        "mean_seconds": float(corpus.durations[plan.utterances].mean()),
        "microbatches": microbatches,
        "microbatch_tokens": config.data.microbatch_tokens,
        "counted": split.texts is not None,
        "positions_run": positions,
        "padding_fraction": float(missing.sum()) / positions,
        "padding_by_kind": {
            kind: float(n) / positions for kind, n in zip(KINDS, missing, strict=True)
        },
        "padding_fraction_planned": plan.padding_fraction,
        "largest_overrun": overrun,
    }


def _prompt_tokens(split: Split, own: np.ndarray, i: int) -> int:
    """In epoch 0."""
    if own[i]:
        return int(own[i])
    shard = split.corpus.shard_of(i) if len(split.prompters) > 1 else 0
    prompter = split.prompters[shard]
    several = len(prompter.prompt_tokens) > 1
    return prompter.prompt_tokens[prompter.text_number(split.corpus.key(i), 0) if several else 0]


if __name__ == "__main__":
    run(main)

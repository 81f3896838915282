from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

import bench_padding
import pytest
from runs import TINY

from speechllm.config.load import load_config
from speechllm.errors import ConfigError
from speechllm.prepare import prepare_text
from speechllm.training_data import epoch_plans, open_training, train_loader

TEXTS = 'model.prompt.texts=["Say: {audio}","Say what you hear in this recording: {audio}"]'


@pytest.mark.parametrize("way", ["exact", "estimate"])
def test_padding_is_that_of_the_batches(shards: Path, way: str) -> None:
    config = load_config(
        TINY,
        [f"data.train={shards}", f"data.text_tokens={way}", TEXTS, "data.num_workers=0",
         "data.microbatch_tokens=500"],
    )  # fmt: skip
    found = bench_padding.measure(config)
    text = prepare_text(config)
    split = open_training(config, text)
    plan_of = epoch_plans(config, split)
    loader = train_loader(config, split, text, plan_of, rank=0, world=1)
    with closing(loader.steps(0, 0)) as steps:
        epoch = list(itertools.islice(steps, plan_of(0).num_steps))
    batches = [m.batch for data in epoch for m in data.microbatches]
    prefix = len(text.prefix)
    assert prefix > 3
    run = sum(len(b.lengths) * (max(b.lengths) - prefix) for b in batches)
    used = sum(length - prefix for b in batches for length in b.lengths)
    assert found["positions_run"] == run
    assert found["padding_fraction"] == pytest.approx(1 - used / run)
    assert sum(found["padding_by_kind"].values()) == pytest.approx(found["padding_fraction"])
    assert found["counted"] == (way == "exact")
    over = max(len(b.lengths) * max(b.lengths) for b in batches) - 500
    assert found["largest_overrun"] == max(0, over)
    assert (over > 0) == (way == "estimate"), "the tiny tokenizer takes a token a character"


def test_lengths_that_change_are_refused(shards: Path) -> None:
    speed = "data.augmentation.speed.probability=0.5"
    with pytest.raises(ConfigError, match="speed"):
        bench_padding.measure(load_config(TINY, [f"data.train={shards}", speed]))

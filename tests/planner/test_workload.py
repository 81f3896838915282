from __future__ import annotations

from dataclasses import replace

import numpy as np

import pytest
from runs import ROOT, tiny_config

from speechllm.config.load import load_config
from speechllm.data.collate import collate
from speechllm.data.plan import plan_epoch
from speechllm.planner.probe import costliest
from speechllm.planner.workload import (
    Utterance,
    assumed,
    microbatch,
    of_split,
    planned_positions,
    row_of,
    shape_of,
)
from speechllm.prepare import open_split, plan_settings, prepare_text
from speechllm.types import Utterance as Spoken

LARGE = ROOT / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml"


def test_the_shape_of_a_microbatch():
    config = load_config(LARGE, [])
    # 10 s: 500 frames, 84 audio tokens at a sixth of that; with text and prompt 158 positions.
    shape = microbatch(config, Utterance(160_000, 50, 24), 3840)
    assert (shape.rows, shape.columns, shape.tokens, shape.frames) == (24, 158, 84, 500)
    assert shape.labels == 24 * 51
    assert microbatch(config, Utterance(160_000, 50, 24), 157) is None


def test_plain_microbatches_hold_so_many_utterances_padded_to_30_s():
    config = load_config(LARGE, ["performance.preset=plain", "performance.plain_utterances=3"])
    shape = microbatch(config, Utterance(160_000, 50, 24, 16), 3840)
    assert (shape.rows, shape.columns, shape.tokens) == (3, 250 + 50 + 24, 84)
    assert (shape.frames, shape.labels, shape.prefix) == (1500, 3 * 51, 16)
    assert microbatch(config, Utterance(160_000, 50, 24), 157) is None  # training drops it
    assert microbatch(config, Utterance(35 * 16_000, 50, 24), 3840).columns == 292 + 50 + 24


def test_padded_audio_takes_the_frames_of_30_s():
    config = load_config(LARGE, ["model.encoder.context=pad30"])
    assert microbatch(config, Utterance(160_000, 50, 24), 3840).frames == 1500


def test_assumed_lengths_end_with_the_longest_allowed():
    config = load_config(LARGE, ["data.max_seconds=12"])
    assert max(u.samples for u in assumed(config)) == 12 * 16_000
    assert max(u.samples for u in assumed(load_config(LARGE, []))) == 30 * 16_000


def test_utterances_of_a_split_cost_what_the_split_says(tmp_path, shards):
    config = tiny_config(tmp_path, shards)
    text = prepare_text(config)
    split = open_split(config, config.data.train, text, key="data.train", budget=4096)
    found = of_split(split, text)
    columns = [microbatch(config, u, 4096).columns for u in found]
    assert max(columns) == split.costs[split.selection.kept].max()
    assert min(columns) == split.costs[split.selection.kept].min()
    kept = split.selection.kept
    assert (planned_positions(config, split, text, kept) == split.costs[kept]).all()
    longest = max(found, key=lambda u: u.samples)
    spoken = Spoken("k", np.zeros(longest.samples, np.int16), "x" * 3 * longest.text_tokens)
    example = text.prompter.example(spoken, 0, with_target=True)
    batch = collate([example], text.audio_tokens, pad_id=text.pad_id)
    row = row_of(config, replace(longest, text_tokens=batch.num_target_tokens - 1))
    assert int(batch.audio_mask_BS.sum()) == row.tokens
    assert row.prefix == len(text.prefix) == len(batch.opening) > 10
    assert shape_of(config, batch, len(batch.opening)) == row


def test_the_costliest_microbatch_has_most_positions_then_the_longest_audio(tmp_path, shards):
    config = tiny_config(tmp_path, shards, "data.microbatch_tokens=300")
    text = prepare_text(config)
    split = open_split(config, config.data.train, text, key="data.train", budget=300)
    plan = plan_epoch(
        split.corpus.shard_sizes, split.costs, split.selection.kept, plan_settings(config), 0
    ).flat()
    chosen = costliest(plan, split.corpus.durations)
    assert plan.positions[chosen] == plan.positions.max()
    ties = np.flatnonzero(plan.positions == plan.positions.max())
    longest = {m: split.corpus.durations[plan.microbatch(m)].max() for m in ties}
    assert longest[chosen] == pytest.approx(max(longest.values()))
